"""A file of JSON objects, one per line, that loses nothing when the program or the machine stops."""
import json
import os


class Journal:
    """Each record is on the disk once append() returns. Half a line at the end, which a power cut may leave,
    is dropped when the file is opened; any other text without a newline is kept."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "a+b", buffering=0)
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        if lines and lines[-1][:1] in b"{\0" and not lines[-1].endswith(b"\n"):
            print(f"{path}: its last line was not written to its end, and is left out")
            self.file.truncate(self.size() - len(lines[-1]))

    def size(self):
        return os.path.getsize(self.path)

    def append(self, record):
        """Returns where the line begins, for cut(). If it cannot be written, the file stays as it was."""
        start, line = self.size(), json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            if self.file.write(line) < len(line):
                raise OSError("the disk is full")
            os.fsync(self.file)
        except OSError:
            self.file.truncate(start)
            raise
        return start

    def cut(self, start):
        """Remove all lines from this one on."""
        self.file.truncate(start)
        os.fsync(self.file)
