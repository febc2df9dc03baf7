"""What a script prints as it works: lines of at most 100 columns, and a table of its steps."""
import sys
import textwrap
import time

WIDTH = 100


def clear(stream=None):
    """The characters that remove an unfinished line from a terminal; none if the stream is no terminal."""
    return "\r\033[K" if (stream or sys.stdout).isatty() else ""


def print_wrapped(start, texts):
    """Print a start and the texts that follow it, on as many lines as it takes. No text is broken."""
    lines = [start]
    for text in texts:
        if len(lines[-1]) + 2 + len(text) > WIDTH:
            lines.append("   ")
        lines[-1] += "  " + text
    print(clear() + "\n".join(lines), flush=True)


def print_numbers(start, numbers):
    """Print a start, and the names and numbers of {name: number}."""
    print_wrapped(start, [f"{name} {x:.3f}" if isinstance(x, float) else f"{name} {x}"
                          for name, x in numbers.items()])


def print_answer(question, answer):
    """Print the start of a question and of its answer; repr shows what else would move the cursor."""
    lines = textwrap.wrap(f"    {question[:70]!r} -> {answer[:200]!r}", WIDTH, subsequent_indent="        ")
    print(clear() + "\n".join(lines), flush=True)


class Table:
    """The steps of a run, one per line: the step, the first of its metrics, as many as fit, and the time that
    is left. The heads come again every 12 lines."""

    def __init__(self, total):
        """total: the number of steps."""
        self.total, self.width, self.lines, self.columns = total, max(4, len(f"{total}/{total}")), 0, {}

    def begin(self, step, metrics):
        """Choose the columns, {name: width}, by the first step's metrics."""
        self.first, self.began, room = step, time.time(), WIDTH - self.width - len("   left")
        for name in metrics:
            width = max(7, len(name))
            room -= 2 + width
            if room < 0:
                break
            self.columns[name] = width

    def add(self, step, metrics, keep):
        """Print a step's line. A terminal shows each step until the next one takes its place or, with `keep`,
        for good; elsewhere only the lines to keep are printed."""
        if not self.columns:
            self.begin(step, metrics)
        if not (keep or sys.stdout.isatty()):
            return
        heads, cells = "step".rjust(self.width), f"{step}/{self.total}".rjust(self.width)
        for name, width in self.columns.items():
            heads += f"  {name:>{width}}"
            cells += f"  {readable(metrics.get(name)):>{width}}"
        if self.lines % 12 == 0:
            print(f"{clear()}{heads}   left")
        print(f"{clear()}{cells}{self.left(step):>7}".rstrip(), end="\n" if keep else "", flush=True)
        self.lines += keep

    def left(self, step):
        """The time left as text, estimated from all steps but the first, which is slow."""
        if step == self.first:
            return ""
        seconds = int((time.time() - self.began) / (step - self.first) * (self.total - step))
        return f"{seconds // 60}:{seconds % 60:02}"


def readable(x):
    """A number as text with three significant digits; nothing for None."""
    return "" if x is None else f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"
