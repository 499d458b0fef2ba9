"""Which (task, trial) an episode plays: arithmetic alone, without the simulator.

The seed of an episode carries everything that its initial state depends on. Its remainder modulo the number of reset
ids is the reset id; the rest decides where the fixtures stand, which LIBERO scatters by a centimetre or so.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from rlinf.core.errors import ConfigError
from rlinf.core.seeding import numpy_generator
from rlinf.envs.episodes import DrawnStarts
from rlinf.envs.libero.config import LiberoConfig


@dataclass(frozen=True)
class Trials:
    """The pairs (task, trial) of a suite, numbered task by task.

    Attributes:
        counts: stored initial states of each task.
    """

    counts: tuple[int, ...]

    @functools.cached_property
    def _firsts(self) -> list[int]:
        return [0, *accumulate(self.counts)]

    @property
    def total(self) -> int:
        """Number of reset ids."""
        return self._firsts[-1]

    def locate(self, reset_id: int) -> tuple[int, int]:
        """(task, trial) of a reset id in [0, total)."""
        task = bisect_right(self._firsts, reset_id) - 1
        return task, reset_id - self._firsts[task]

    def reset_id(self, task: int, trial: int) -> int:
        """Inverse of `locate`."""
        return self._firsts[task] + trial


@dataclass(frozen=True)
class TrialStarts:
    """`Starts` of LIBERO: a drawn, a fixed, an ordered or an exhaustive choice of reset ids.

    Attributes:
        trials: of the suite.
        num_rows: environments over all workers and stages.
        group_size: so many neighbouring environments begin every episode alike.
        fixed: the reset id of every episode, or None.
        order: reset ids to go through, or None for drawn ones. Environments take turns, in the order of their numbers.
        exhaustive: each environment has a list of its own instead, and together they hold every reset id once.
    """

    trials: Trials
    num_rows: int
    group_size: int = 1
    fixed: int | None = None
    order: tuple[int, ...] | None = None
    exhaustive: bool = False

    def seed(self, root: int, row: int, episode: int) -> int:
        """As `Starts.seed`."""
        drawn = DrawnStarts(self.group_size).seed(root, row, episode)
        reset_id = self._reset_id(row, episode)
        return drawn if reset_id is None else with_remainder(drawn, reset_id, self.trials.total)

    def task(self, seed: int) -> int:
        """As `Starts.task`."""
        return self.trials.locate(seed % self.trials.total)[0]

    def length(self, row: int) -> int | None:
        """As `Starts.length`."""
        return len(share(row, self.num_rows, self.trials.total)) if self.exhaustive else None

    def _reset_id(self, row: int, episode: int) -> int | None:
        if self.exhaustive:
            own = share(row, self.num_rows, self.trials.total)
            return own[episode % len(own)]
        if self.fixed is not None:
            return self.fixed
        if self.order is None:
            return None
        groups = self.num_rows // self.group_size
        return self.order[(episode * groups + row // self.group_size) % len(self.order)]


def share(row: int, rows: int, total: int) -> range:
    """The reset ids of one row when all are dealt out to `rows`: neighbours, so that a row seldom changes its task."""
    return range(row * total // rows, (row + 1) * total // rows)


def with_remainder(seed: int, remainder: int, modulus: int) -> int:
    """The largest number not above `seed` (one modulus more where it would be negative) with that remainder."""
    moved = seed - (seed - remainder) % modulus
    return moved if moved >= 0 else moved + modulus


def shuffled(total: int, seed: int) -> tuple[int, ...]:
    """All reset ids in an order that follows from `seed`."""
    return tuple(int(i) for i in numpy_generator(seed, "reset ids").permutation(total))


def starts_of(config: LiberoConfig, trials: Trials) -> TrialStarts:
    """What a configuration asks for.

    Raises:
        ConfigError: it asks for a reset id that the suite has not, or for more environments than there are.
    """
    suite, total = config.task_suite_name, trials.total
    if config.specific_reset_id is not None and config.specific_reset_id >= total:
        raise ConfigError(
            f"env.*.specific_reset_id is {config.specific_reset_id}, but {suite} has the reset ids 0 to {total - 1}"
        )
    if config.is_eval and config.total_num_envs > total:
        raise ConfigError(
            f"env.*.total_num_envs ({config.total_num_envs}) is more than the {total} reset ids of {suite}, each of "
            f"which is_eval plays once; lower it to {total} or less"
        )
    ordered = config.use_ordered_reset_state_ids and config.specific_reset_id is None and not config.is_eval
    return TrialStarts(
        trials,
        config.total_num_envs,
        group_size=config.group_size,
        fixed=config.specific_reset_id,
        order=shuffled(total, config.seed) if ordered else None,
        exhaustive=config.is_eval,
    )
