"""Infrastructure: what scripts that train or run networks share. No algorithm is in here."""
