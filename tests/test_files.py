"""Files that appear whole, one run per folder."""
import json

import pytest

from runtime import files


def test_write_json_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(str(path), {"β": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"β": [1, 2.5, None]}
    with pytest.raises(TypeError):
        files.write_json(str(path), {"fine": 1, "not": object()})
    assert json.loads(path.read_text()) == {"β": [1, 2.5, None]}
    files.write_json(str(path), 3)
    assert path.read_text() == "3" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
