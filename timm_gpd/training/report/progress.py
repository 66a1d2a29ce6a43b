"""What a person sees of a run while it trains: a progress bar on a terminal, timm's log lines elsewhere."""

import logging
import sys
from typing import Any, List, Mapping, Optional, Tuple

from timm.utils import AverageMeter
from tqdm import tqdm

__all__ = ['Progress']

_logger = logging.getLogger('train')

BAR = '{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}'


class Progress:
    """Follows a run. A context: between entering and leaving it, the bar is on the terminal.

    timm's log lines are written every ``log_interval`` updates. Where stderr is a terminal, a bar shows epoch, time
    left of the run, loss, the last validation's top-1 and images/s; every validated epoch leaves a line above it, and
    of what is logged, to loggers of all names, the terminal then shows warnings and errors only. Log files get all.

    Args:
        num_epochs: epochs of the run.
        updates_per_epoch: updates of the optimizer in an epoch.
        log_interval: updates between log lines.
        updates_done: updates of the run that an earlier call has done, where it is resumed.
        is_primary: whether this is the process that reports. All others are silent.
    """

    def __init__(
        self,
        num_epochs: int,
        updates_per_epoch: int,
        log_interval: int = 50,
        updates_done: int = 0,
        is_primary: bool = True,
    ) -> None:
        self.num_epochs, self.updates_per_epoch, self.updates_done = num_epochs, updates_per_epoch, updates_done
        self.log_interval, self.is_primary = log_interval, is_primary
        self.epoch: Optional[int] = None
        self.loss_mean, self.images = float('nan'), 0
        self.update_time, self.data_time = AverageMeter(), AverageMeter()
        self.accuracies = ''
        self.bar: Optional[tqdm] = None
        self.terminal: Optional[_Terminal] = None

    def __enter__(self) -> 'Progress':
        if self.is_primary and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.num_epochs * self.updates_per_epoch,
                initial=self.updates_done,
                bar_format=BAR,
                smoothing=0,  # time left counts what lies between updates too, such as validations
                dynamic_ncols=True,
                file=sys.stderr,
            )
            self.terminal = _Terminal()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None and self.terminal is not None:
            self.bar.close()
            self.terminal.give_back()
            self.bar = self.terminal = None

    def step(
        self,
        epoch: int,
        update: int,
        loss: float,
        loss_mean: float,
        lr: float,
        images: int,
        seconds: float,
        data_seconds: float,
    ) -> None:
        """Notes one update of the optimizer.

        Args:
            epoch: index of the epoch, from 0.
            update: index of the update in its epoch, from 0.
            loss: of this update.
            loss_mean: of the epoch so far.
            lr: mean learning rate.
            images: of this update, on all processes.
            seconds: that the update took, waiting for its images included.
            data_seconds: that it waited for its images.
        """
        if not self.is_primary:
            return
        if epoch != self.epoch:
            self.epoch, self.images = epoch, 0
            self.update_time.reset()
            self.data_time.reset()
        self.loss_mean = loss_mean
        self.images += images
        self.update_time.update(seconds)
        self.data_time.update(data_seconds)
        if update % self.log_interval == 0 or update == self.updates_per_epoch - 1:
            time, data = self.update_time, self.data_time
            _logger.info(
                f'Train: {epoch} [{update:>4d}/{self.updates_per_epoch} '
                f'({100.0 * (update + 1) / self.updates_per_epoch:>3.0f}%)]  '
                f'Loss: {loss:#.3g} ({loss_mean:#.3g})  '
                f'Time: {time.val:.3f}s, {_per_second(images, time.val):>7.2f}/s  '
                f'({time.avg:.3f}s, {_per_second(images, time.avg):>7.2f}/s)  '
                f'LR: {lr:.3e}  '
                f'Data: {data.val:.3f} ({data.avg:.3f})'
            )
        if self.bar is not None:
            self.bar.set_description_str(f'epoch {epoch}/{self.num_epochs - 1}', refresh=False)
            self._set_numbers(self.bar)
            self.bar.update(epoch * self.updates_per_epoch + update + 1 - self.bar.n)

    def _set_numbers(self, bar: tqdm) -> None:
        rate = _per_second(self.images, self.update_time.sum)
        bar.set_postfix_str(f'loss {self.loss_mean:#.3g}{self.accuracies}, {rate:.0f} img/s', refresh=False)

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Notes what a validation found.

        Args:
            metrics: its results; ``top1`` is the student's, ``teacher_top1`` the dynamic teacher's, in percent. It is
                ``map`` of images with several labels.
        """
        if self.bar is None:
            return
        metric = 'top1' if 'top1' in metrics else 'map'
        names = {metric: 'student', f'teacher_{metric}': 'teacher'}
        found = ''.join(f', {label} {metrics[name]:.2f}' for name, label in names.items() if name in metrics)
        self.accuracies = found
        self._set_numbers(self.bar)
        gap = f', gap {metrics["gap"]:.2f}' if 'gap' in metrics else ''
        text = f'loss {self.loss_mean:#.3g}{found}{gap}'
        self.bar.write(f'epoch {self.epoch}: {text}', file=sys.stderr)


def _per_second(images: int, seconds: float) -> float:
    return images / max(seconds, 1e-9)  # a clock may be coarser than an update


class _Terminal:
    """Lets log handlers that write to the terminal write warnings and errors only, above the bar."""

    def __init__(self) -> None:
        self.kept: List[Tuple[logging.StreamHandler, Any, int]] = []
        for handler in logging.root.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stderr, sys.stdout):
                self.kept.append((handler, handler.stream, handler.level))
                handler.setStream(_AboveBar(handler.stream))
                handler.setLevel(max(handler.level, logging.WARNING))

    def give_back(self) -> None:
        for handler, stream, level in self.kept:
            handler.setStream(stream)
            handler.setLevel(level)


class _AboveBar:
    """A stream that clears the bar, writes, and draws the bar again."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        tqdm.write(text, file=self.stream, end='')

    def flush(self) -> None:
        self.stream.flush()
