"""What tests share. Failed asserts in here are explained as in a test."""
import pytest

pytest.register_assert_rewrite("helpers.plainly", "helpers.start")
