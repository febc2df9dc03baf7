"""A file of JSON objects, one per line, that a power cut or a full disk leaves whole."""
import json
import os

from runtime.launch import warn


class Journal:
    """Each line is on the disk when `append` returns. The last line of an existing file is dropped if it was
    not written to its end; any other file that ends without a newline is left as it is."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "a+b", buffering=0)
        self.file.seek(0)
        last = self.file.read().rpartition(b"\n")[2]
        if last[:1] in (b"{", b"\0"):               # after a power cut, a file system may leave zeros
            warn(f"{path}: its last line was not written to its end, and is dropped")
            self.file.truncate(self.size() - len(last))

    def size(self):
        return os.path.getsize(self.path)

    def append(self, record):
        """Returns where the line begins, for `cut`. If it cannot be written, the file stays as it was."""
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
        """Remove the line that begins here, and all after it."""
        self.file.truncate(start)
        os.fsync(self.file)
