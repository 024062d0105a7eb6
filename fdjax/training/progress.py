"""Shows a run's progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from fdjax.training.phases import Phase

# Seconds between plain lines when the output is not a terminal.
_LINE_EVERY = 15.0


def duration(seconds: float) -> str:
    """Formats seconds, such as 12 s, 3 min 20 s or 1 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Shows the progress of one phase.

    Args:
      phase: the phase.
      done: number of its steps that are done already.
      later: number of steps in the phases after it.
      quiet: whether to show nothing.
    """

    def __init__(self, phase: Phase, done: int = 0, later: int = 0, quiet: bool = False):
        self._phase, self._later, self._quiet = phase, later, quiet
        self._done = self._first = done
        self._begin = self._last_line = time.monotonic()
        self._timed: tuple[float, int] | None = None
        self._told = False
        self._bar = (
            tqdm(total=phase.steps, initial=done, desc=phase.name, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty() and not quiet
            else None
        )

    def advance(self, steps: int, figures: dict[str, float]) -> None:
        """Shows that `steps` more are done, with the newest figures (accuracies are shares, 0 to 1)."""
        self._done += steps
        now = time.monotonic()
        if self._timed is None:  # The time of the first steps includes the compilation.
            self._timed = now, self._done
        elif not self._told:
            self._told = True
            rate = (now - self._timed[0]) / (self._done - self._timed[1])
            left = (self._phase.steps - self._done) * rate
            whole = f", {duration(left + self._later * rate)} for the run at this rate" if self._later else ""
            self.say(
                f"{self._phase.name}: {rate * 1e3:.0f} ms a step, about {duration(left)} left in this phase{whole}"
            )
        text = _text(figures)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(steps)
        elif now - self._last_line > _LINE_EVERY and self._done < self._phase.steps:
            self._last_line = now
            rate = (self._done - self._first) / (now - self._begin)
            left = duration((self._phase.steps - self._done) / rate)
            step = f"step {self._done} of {self._phase.steps}"
            self.say(f"{self._phase.name}: {step}, {rate:.1f} a second, {left} left, {text}")

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stdout)
        elif not self._quiet:
            print(message, flush=True)

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()


def _text(figures: dict[str, float]) -> str:
    shown = []
    if "train_loss" in figures:
        shown.append(f"loss {figures['train_loss']:.3f}")
    if "train_top1" in figures:
        shown.append(f"top-1 {100 * figures['train_top1']:.1f}%")
    if "macs_ratio" in figures:
        shown.append(f"MACs {figures['macs_ratio']:.3f}x")
    return ", ".join(shown)
