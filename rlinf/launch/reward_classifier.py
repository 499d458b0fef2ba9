"""Train the network that says from pictures whether a robot cell's task is solved.

What it learns from are recorded episodes: the last pictures of a successful one show success, all others do not. As in
SERL and HIL-SERL (Luo et al. 2024, arXiv:2401.16013, arXiv:2410.21845): binary cross-entropy, half of every batch of
either kind, pictures shifted at random. Unlike there, episodes are held out, by which the best weights are chosen.

    B batch, T pictures of an episode, H and W size of a picture
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlinf.core.errors import DataError
from rlinf.core.seeding import derive_seed, numpy_generator, torch_generator
from rlinf.data.columns import write_atomic
from rlinf.data.demo_folder import Episode, list_episodes, read_pictures
from rlinf.envs.realworld.classifier import Sizes, SuccessClassifier, pack_classifier, stack
from rlinf.functional.random_shift import draw_offsets, random_shift
from rlinf.launch.collect import Progress

EVALUATIONS = 20
"""So often the held-out episodes are looked at."""
AT_ONCE = 256
"""Pictures that are judged at once."""


@dataclass(frozen=True)
class ClassifierOptions:
    """What is learned from what.

    Attributes:
        folders: of demonstrations, successful and failed episodes.
        failures: folders of which every picture shows failure, whatever was recorded of their episodes' success.
        output: the file.
        success_frames: so many last pictures of a successful episode show success.
        gap: so many pictures before those show neither for sure and are left out.
        held_out: share of the episodes that is not learned from.
        steps, batch_size, learning_rate: of the optimiser, Adam.
        shift: pixels by which pictures are shifted at most; None: 1/32 of their height.
        threshold: probability from which on a picture counts as success, `override_cfg.classifier_threshold`.
        seed: of the split, the first weights and the batches.
    """

    folders: tuple[str, ...]
    output: str
    failures: tuple[str, ...] = ()
    success_frames: int = 1
    gap: int = 0
    held_out: float = 0.2
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 1e-3
    shift: int | None = None
    threshold: float = 0.85
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Labelled:
    """The pictures of an episode, camera → uint8 [T, H, W, 3], and which of them show success, bool [T]."""

    pictures: dict[str, np.ndarray]
    success: np.ndarray

    @property
    def sizes(self) -> Sizes:
        """Camera → (H, W)."""
        return {name: picture.shape[1:3] for name, picture in sorted(self.pictures.items())}


@dataclass(frozen=True)
class Figures:
    """How a classifier does on episodes.

    Attributes:
        loss: mean over success and failure of their mean cross-entropies.
        accuracy, precision, recall: of single pictures at the threshold; NaN where there is nothing to divide by.
        pictures: (of success, of failure).
        paid: successful episodes whose first picture above the threshold shows success.
        early: episodes with a picture of failure above the threshold before any of success: paid wrongly.
        successful, episodes: their numbers.
    """

    loss: float
    accuracy: float
    precision: float
    recall: float
    pictures: tuple[int, int]
    paid: int
    early: int
    successful: int
    episodes: int

    def describe(self, threshold: float) -> list[str]:
        """Lines for people."""
        success, failure = self.pictures
        return [
            f"held out: {self.episodes} episodes, {success} pictures of success and {failure} of failure",
            f"at threshold {threshold:g}: accuracy {self.accuracy:.3f}, precision {self.precision:.3f}, "
            f"recall {self.recall:.3f}",
            f"as a reward: {self.paid} of {self.successful} successes paid when they came, "
            f"{self.early} of {self.episodes} episodes paid too early or wrongly",
        ]


def train_classifier(options: ClassifierOptions, progress: Progress) -> Figures:
    """Train on the folders, and keep the best weights in `options.output`. How they do on what was held out.

    The file is replaced whenever the weights are better than those before: an interruption leaves the best so far.

    Raises DataError where the folders hold no pictures, pictures of one kind alone, of several sizes or cameras, or too
    few episodes to hold some out; or where the file cannot be written.
    """
    episodes = read_labelled(options)
    learned, held = split(episodes, options.held_out, options.seed)
    for name, part in (("learned from", learned), ("held out", held)):
        success = sum(int(episode.success.sum()) for episode in part)
        total = sum(len(episode.success) for episode in part)
        progress.note(f"{name}: {len(part)} episodes, {success} pictures of success and {total - success} of failure")
    sizes, path = episodes[0].sizes, Path(options.output)

    def keep(network: SuccessClassifier, figures: Figures, step: int) -> None:
        about = {"step": step, "threshold": options.threshold, "folders": [*options.folders, *options.failures]}
        about |= {name: getattr(figures, name) for name in ("loss", "accuracy", "precision", "recall")}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, pack_classifier(network, sizes, about))
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}; choose another place with -o") from error

    return fit(learned, held, options, keep, progress)


# ---- pictures


def read_labelled(options: ClassifierOptions) -> list[Labelled]:
    """All episodes of the folders with what their pictures show. Raises DataError."""
    labelled: list[Labelled] = []
    for folder in (*options.folders, *options.failures):
        meta, episodes = list_episodes(folder)
        if not any(path.startswith("images/") for path in meta.obs_shapes):
            raise DataError(
                f"{folder} holds no pictures ({', '.join(sorted(meta.obs_shapes))}): record with cameras, env.train."
                "override_cfg.cameras"
            )
        only_failures = folder in options.failures
        labelled += [_label(folder, episode, options, only_failures) for episode in episodes]
    if len({tuple(episode.sizes.items()) for episode in labelled}) > 1:
        raise DataError(f"{', '.join(options.folders + options.failures)}: their cameras differ; they must be alike")
    success = sum(int(episode.success.sum()) for episode in labelled)
    total = sum(len(episode.success) for episode in labelled)
    if not success:
        raise DataError(
            f"no picture of success in {', '.join(options.folders)}: none of {len(labelled)} episodes was successful; "
            "record some that are (python -m rlinf collect)"
        )
    if success == total:
        raise DataError(
            f"no picture of failure: with --success-frames {options.success_frames} every picture shows success; lower "
            "it, or record failures (collect --all) and give their folder with --failures"
        )
    return labelled


def _label(folder: str, episode: Episode, options: ClassifierOptions, only_failures: bool) -> Labelled:
    if episode.damage:
        raise DataError(f"{episode.damage} (python -m rlinf demos {folder} --check)")
    if episode.success is None and not only_failures:
        raise DataError(
            f"{folder} does not say which of its episodes were successful; if none was, give it with --failures, "
            "otherwise record anew"
        )
    pictures = read_pictures(folder, episode)
    total = len(next(iter(pictures.values())))
    shows = np.zeros(total, bool)
    if not episode.success or only_failures:
        return Labelled(pictures, shows)
    first = max(0, total - options.success_frames)
    shows[first:] = True
    kept = np.r_[0 : max(0, first - options.gap), first:total]
    return Labelled({name: pictures[name][kept] for name in pictures}, shows[kept])


def split(episodes: Sequence[Labelled], share: float, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """Episodes to learn from, and those held out: so large a share of the successful ones, and of the others.

    Raises DataError where either part would lack pictures of one kind.
    """
    generator = numpy_generator(seed, "held out")
    learned: list[Labelled] = []
    held: list[Labelled] = []
    for successful in (True, False):
        kind = [episode for episode in episodes if bool(episode.success.any()) == successful]
        order = generator.permutation(len(kind)).tolist()
        count = max(round(share * len(kind)), min(1, len(kind) - 1))
        held += [kind[i] for i in order[:count]]
        learned += [kind[i] for i in order[count:]]
    for name, part in (("learn from", learned), ("hold out", held)):
        kinds = {kind for episode in part for kind in np.unique(episode.success).tolist()}
        if len(kinds) < 2:
            lacking = "success" if True not in kinds else "failure"
            raise DataError(
                f"{len(episodes)} episodes leave no picture of {lacking} to {name}: record more of them (at least two, "
                f"better twenty), or change --held-out {share:g}"
            )
    return learned, held


# ---- learning


def fit(
    learned: Sequence[Labelled],
    held: Sequence[Labelled],
    options: ClassifierOptions,
    keep: Callable[[SuccessClassifier, Figures, int], None],
    progress: Progress,
) -> Figures:
    """Train a classifier; `keep` gets it whenever it is better on `held` than before. Returns the best figures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(options.seed, "classifier"))
        network = SuccessClassifier(len(learned[0].pictures))
    optimizer = torch.optim.Adam(network.parameters(), options.learning_rate)
    generator = torch_generator(options.seed, "batches")
    cameras = {name: torch.from_numpy(np.concatenate([e.pictures[name] for e in learned])) for name in learned[0].sizes}
    shows = torch.from_numpy(np.concatenate([episode.success for episode in learned]))
    kinds, half = [(shows == kind).nonzero().flatten() for kind in (False, True)], options.batch_size // 2
    label = torch.arange(2).repeat_interleave(half).float()
    best: Figures | None = None
    every, began = math.ceil(options.steps / EVALUATIONS), time.monotonic()
    for step in range(1, options.steps + 1):
        rows = torch.cat([kind[torch.randint(len(kind), (half,), generator=generator)] for kind in kinds])
        drawn = {name: _shifted(picture[rows], options.shift, generator) for name, picture in cameras.items()}
        loss = F.binary_cross_entropy_with_logits(network(stack(drawn)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        left = (time.monotonic() - began) / step * (options.steps - step)
        text = f"step {step}/{options.steps}: loss {loss.item():.4f}"
        progress.status(f"{text}; about {left:.0f} s left")
        if step % every == 0 or step == options.steps:
            figures = judge(network, held, options.threshold)
            better = best is None or figures.loss < best.loss
            if better:
                best = figures
                keep(network, figures, step)
            progress.note(
                f"{text}, held out {figures.loss:.4f}, accuracy {figures.accuracy:.3f}{', kept' if better else ''}"
                f"; about {left:.0f} s left"
            )
    assert best is not None
    return best


def _shifted(pictures: Tensor, shift: int | None, generator: torch.Generator) -> Tensor:
    pad = pictures.shape[1] // 32 if shift is None else shift
    return random_shift(pictures, draw_offsets(len(pictures), pad, generator), pad) if pad else pictures


@torch.no_grad()
def judge(network: SuccessClassifier, episodes: Sequence[Labelled], threshold: float) -> Figures:
    """How a classifier does on whole episodes."""
    odds = [_log_odds(network, episode) for episode in episodes]
    shows = [torch.from_numpy(episode.success) for episode in episodes]
    logits, truth = torch.cat(odds), torch.cat(shows)
    losses = F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none")
    counted = torch.sigmoid(logits) >= threshold
    right = int((counted & truth).sum())
    paid = early = 0
    for own, true in zip(odds, shows, strict=True):
        above = (torch.sigmoid(own) >= threshold).nonzero().flatten().tolist()
        if above:
            paid += bool(true[above[0]])
            early += not bool(true[above[0]])
    return Figures(
        loss=float((losses[truth].mean() + losses[~truth].mean()) / 2),
        accuracy=float((counted == truth).float().mean()),
        precision=_ratio(right, int(counted.sum())),
        recall=_ratio(right, int(truth.sum())),
        pictures=(int(truth.sum()), int((~truth).sum())),
        paid=paid,
        early=early,
        successful=sum(bool(true.any()) for true in shows),
        episodes=len(episodes),
    )


def _log_odds(network: SuccessClassifier, episode: Labelled) -> Tensor:
    parts = []
    for begin in range(0, len(episode.success), AT_ONCE):
        pictures = {name: torch.from_numpy(p[begin : begin + AT_ONCE]) for name, p in episode.pictures.items()}
        parts.append(network(stack(pictures)))
    return torch.cat(parts)


def _ratio(part: int, total: int) -> float:
    return part / total if total else math.nan
