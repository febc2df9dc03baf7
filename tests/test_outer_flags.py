"""The flags of feedback/ and lab/, which refuse what is out of range as the stages' flags do."""
import pytest
from test_flags import assert_refused, every_flag

from feedback import collect, judge, label, rounds
from lab import plan


@pytest.mark.parametrize("script, name, value, said", list(every_flag([collect, judge, label, rounds, plan])),
                         ids=lambda v: getattr(v, "__name__", None))
def test_every_flag_out_of_range_is_refused_with_the_range(capsys, script, name, value, said):
    assert_refused(capsys, script, name, value, said)
