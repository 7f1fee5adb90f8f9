"""Shows the progress of long work: a bar in a terminal, a line per 30 seconds in a log."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 30  # between progress lines where there is no terminal: an hour's training adds 10 KB to a notebook


def progress_bar(total: int, unit: str, description: str | None = None, **options) -> tqdm:
    """A tqdm bar; without a terminal, where each update stays as a line, it updates once per LINE_SECONDS."""
    seconds = 0.1 if sys.stderr.isatty() else LINE_SECONDS
    return tqdm(total=total, unit=unit, desc=description, mininterval=seconds, **options)


class Progress:
    """A bar on a terminal; elsewhere (a notebook, a log file) a line per 30 seconds. Shows the time left."""

    def __init__(self, total: int, done: int = 0, gpu_gb: float | None = None):
        """Start at `done` of `total` updates; `gpu_gb` is the memory of the GPU."""
        self.gpu_gb = gpu_gb
        self.began, self.done_before, self.total = time.monotonic(), done, total
        self.bar = tqdm(total=total, initial=done, unit="update", file=sys.stderr) if sys.stderr.isatty() else None
        self.last_line = time.monotonic()

    def show(self, done: int, label: str, values: dict) -> None:
        text = f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, {values['images_per_second']:.0f} images/s"
        text += f", {values['data_wait']:.0%} waiting for data"
        if self.gpu_gb is not None:
            text += f", {values['gpu_memory_gb']:.1f} of {self.gpu_gb:.0f} GB"
        if self.bar is not None:
            self.bar.set_description(label)
            self.bar.set_postfix_str(text)
            self.bar.update(done - self.bar.n)
        elif time.monotonic() - self.last_line >= LINE_SECONDS:
            left = (time.monotonic() - self.began) / max(1, done - self.done_before) * (self.total - done)
            self.say(f"{label}, update {done:,}/{self.total:,}: {text}, {tqdm.format_interval(left)} left")

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)
        self.last_line = time.monotonic()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
