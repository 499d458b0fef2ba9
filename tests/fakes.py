"""Small stand-ins that make mistakes of the machinery visible: a counting env and agent, a tiny learner."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlinf.core.ranks import ONE_RANK
from rlinf.core.seeding import numpy_generator, torch_generator
from rlinf.core.types import ActionOut, EnvSpaces, EnvStep, Trajectory
from rlinf.launch.crew import Layout
from rlinf.runners.crew import Crew
from rlinf.runners.evaluate import Evaluator
from rlinf.runtime.local import Channel, Flag, Group, Weights
from rlinf.workers.env_worker import EnvWorker
from rlinf.workers.learner_worker import LearnerWorker
from rlinf.workers.rollout_worker import RolloutWorker

H = 2


class CountingEnv:
    """Environment i shows [i, number of chunks played] and insists that the action repeats what it showed.

    Episode lengths differ between environments: number i truncates every `2 + i % 3` chunks. The count goes on
    over episodes and starts again at a seeded reset only.
    """

    def __init__(self, num_envs: int, first: int = 0, before_step: Callable[[], None] = lambda: None) -> None:
        self.num_envs = num_envs
        self.spaces = EnvSpaces({"state": (2,)}, {"state": "float32"}, action_dim=2)
        self.ids = torch.arange(first, first + num_envs).float()
        self.length = 2 + self.ids.long() % 3
        self.count = torch.zeros(num_envs)
        self.age = torch.zeros(num_envs, dtype=torch.long)
        self.before_step = before_step
        self.seeds: list[int | None] = []
        self.closed = 0

    def reset(self, seed: int | None = None) -> dict[str, Any]:
        self.seeds.append(seed)
        if seed is not None:
            self.count = torch.zeros(self.num_envs)
        self.age = torch.zeros(self.num_envs, dtype=torch.long)
        return self._obs()

    def _obs(self) -> dict[str, Any]:
        return {"state": torch.stack([self.ids, self.count], -1)}

    def step(self, action: torch.Tensor) -> EnvStep:
        self.before_step()
        shown = self._obs()["state"][:, None].expand(-1, H, -1)
        assert torch.equal(action, shown), f"observation {shown[:, 0]} was answered with {action[:, 0]}"
        self.count = self.count + 1
        self.age = self.age + 1
        obs, truncated = self._obs(), self.age >= self.length
        info = {
            "episode/episode_len": self.age.float() * H,
            "episode/env": self.ids,
            "success": torch.zeros(self.num_envs, dtype=torch.bool),
        }
        self.age = torch.where(truncated, 0, self.age)
        no = torch.zeros(self.num_envs, H, dtype=torch.bool)
        return EnvStep(obs, obs, shown[..., 1].clone(), no, truncated, action, no, info)

    def render(self) -> np.ndarray:
        return np.full((self.num_envs, 2, 2, 3), self.count[:, None, None, None].numpy(), np.uint8)

    def close(self) -> None:
        self.closed += 1


class CountingActor(nn.Module):
    """Repeats the observation as its action; the decision also tells how many updates its weights have seen."""

    def __init__(self, before_act: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.register_buffer("updates", torch.zeros(()))
        self.before_act, self.noise_shape = before_act, (1,)

    def act(self, obs: dict[str, Any], mode: str, noise: torch.Tensor | None = None) -> ActionOut:
        self.before_act()
        state = obs["state"]
        updates = self.updates.expand(len(state), 1)
        return ActionOut(state[:, None].expand(-1, H, -1), torch.cat([state, updates], -1))


class CountingAlgorithm:
    """Checks that what arrives is what was played, in order, once; remembers how stale it was."""

    def __init__(self, before_update: Callable[[], None] = lambda: None) -> None:
        self.updates = 0
        self.before_update = before_update
        self.seen: list[Trajectory] = []
        self.staleness: list[set[int]] = []
        self.saved: dict[str, Any] = {}

    def observe(self, trajectory: Trajectory) -> None:
        before = [t for t in self.seen if t.source == trajectory.source]
        state = trajectory.obs["state"]
        assert torch.equal(state[:-1], trajectory.decision[..., :2]), "decision and observation do not belong together"
        steps = torch.arange(len(state))[:, None]
        assert torch.equal(state[..., 1], state[0, :, 1] + steps), "an observation was lost or came twice"
        assert trajectory.continues == (bool(before) and float(state[0, 0, 1]) > 0)
        if trajectory.continues:
            assert torch.equal(before[-1].obs["state"][-1], state[0]), "segments do not join"
        self.seen.append(trajectory)
        self.staleness.append({self.updates - int(v) for v in trajectory.decision[..., 2].flatten()})

    def ready(self) -> bool:
        return True

    def update(self) -> dict[str, Any]:
        self.before_update()
        self.updates += 1
        return {"fake/loss": torch.tensor(float(self.updates)), "fake/number": 1.0}

    def acting_weights(self) -> tuple[int, dict[str, torch.Tensor]]:
        return self.updates, {"updates": torch.tensor(float(self.updates))}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]

    def buffers(self) -> dict[str, Any]:
        return {}


class ReachEnv:
    """N points on a line, pushed by actions and by noise of their own; reward −|x|; 7 chunks per episode."""

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.spaces = EnvSpaces({"state": (1,)}, {"state": "float32"}, action_dim=1, max_episode_steps=7 * H)
        self.generator = torch.Generator()
        self.x = torch.zeros(num_envs, 1)
        self.age = 0
        self.total = torch.zeros(num_envs)

    def reset(self, seed: int | None = None) -> dict[str, Any]:
        if seed is not None:
            self.generator.manual_seed(seed)
        self.x = torch.rand(self.num_envs, 1, generator=self.generator) * 2 - 1
        self.age, self.total = 0, torch.zeros(self.num_envs)
        return {"state": self.x}

    def step(self, action: torch.Tensor) -> EnvStep:
        rewards = []
        for push in action.unbind(1):
            noise = torch.randn(self.x.shape, generator=self.generator)
            self.x = (self.x + 0.3 * push + 0.01 * noise).clamp(-2, 2)
            rewards.append(-self.x.abs().squeeze(-1))
        self.age += 1
        self.total = self.total + sum(rewards)
        last = {"state": self.x}
        done = self.age == 7
        info = {"episode/return": self.total, "episode/episode_len": torch.full((self.num_envs,), 7.0 * H)}
        obs = self.reset() if done else last
        no = torch.zeros(self.num_envs, H, dtype=torch.bool)
        truncated = torch.full((self.num_envs,), done)
        return EnvStep(obs, last, torch.stack(rewards, 1), no, truncated, action, no, info)

    def render(self) -> None:
        return None

    def close(self) -> None:
        pass


class ResumableReachEnv(ReachEnv):
    """A ReachEnv whose exact state can be saved."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(),
            "x": self.x,
            "age": self.age,
            "total": self.total.numpy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.x, self.age = state["x"], state["age"]
        self.total = torch.from_numpy(state["total"])


class TinyActor(nn.Module):
    """One linear layer with Gaussian noise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, H)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.noise_shape = (H,)

    def act(self, obs: dict[str, Any], mode: str, noise: torch.Tensor | None = None) -> ActionOut:
        action = self.layer(obs["state"])
        if mode == "train":
            action = action + 0.2 * noise
        return ActionOut(action.clamp(-1, 1)[..., None], action)


class TinyBuffer:
    """All observations, in one array."""

    def __init__(self, seed: int) -> None:
        self.generator = numpy_generator(seed, "buffer")
        self.states = np.zeros((0, 1), np.float32)

    def sample(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self.states[self.generator.integers(len(self.states), size=number)])

    def save(self, directory: str) -> None:
        np.save(Path(directory) / "states.npy", self.states)
        (Path(directory) / "generator.json").write_text(json.dumps(self.generator.bit_generator.state))

    def load(self, directory: str) -> None:
        self.states = np.load(Path(directory) / "states.npy")
        self.generator.bit_generator.state = json.loads((Path(directory) / "generator.json").read_text())

    def statistics(self) -> dict[str, float]:
        return {"size": float(len(self.states))}


class TinyAlgorithm:
    """Learns to push the point to the origin, from noisy samples of where the point was."""

    def __init__(self, seed: int = 0, start_at: int = 1) -> None:
        self.actor = TinyActor()
        self.optimizer = torch.optim.Adam(self.actor.parameters(), lr=0.02)
        self.generator = torch_generator(seed, "algorithm")
        self.buffer = TinyBuffer(seed)
        self.updates, self.start_at = 0, start_at

    def observe(self, trajectory: Trajectory) -> None:
        new = trajectory.obs["state"][:-1].reshape(-1, 1).numpy()
        self.buffer.states = np.concatenate([self.buffer.states, new])

    def ready(self) -> bool:
        return len(self.buffer.states) >= self.start_at

    def update(self) -> dict[str, Any]:
        state = self.buffer.sample(32)
        push = self.actor.layer(state).sum(-1, keepdim=True)
        noise = 0.05 * torch.randn(push.shape, generator=self.generator)
        loss = (state + 0.3 * push + noise).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.updates += 1
        return {"tiny/loss": loss.detach()}

    def acting_weights(self) -> tuple[int, dict[str, torch.Tensor]]:
        return self.updates, {name: value.clone() for name, value in self.actor.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "actor": self.actor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.actor.load_state_dict(state["actor"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.updates = state["updates"]

    def held(self) -> dict[str, Any]:
        return self.state_dict()

    def buffers(self) -> dict[str, Any]:
        return {"replay_buffer": self.buffer}


class RecordingReporter:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}
        self.notes: list[str] = []
        self.videos: dict[str, np.ndarray] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.logged[step] = self.logged.get(step, {}) | metrics

    def note(self, text: str) -> None:
        self.notes.append(text)

    def video(self, name: str, frames: np.ndarray, fps: float) -> None:
        self.videos[name] = frames


def build_crew(
    envs: list[list[Any]],
    actors: list[Any],
    algorithm: Any,
    *,
    auto_reset: bool = True,
    timeout_s: float = 20.0,
    weights: Weights | None = None,
    offload: bool = False,
) -> Crew:
    """One env worker per entry of `envs` (its stages), shared out evenly among one rollout worker per actor."""
    obs, actions, experience, stop = Channel("obs"), Channel("actions"), Channel("experience"), Flag()
    weights = weights or Weights()
    channels = (obs, actions, experience)
    per_rollout = len(envs) // len(actors)

    def env(rank: int) -> EnvWorker:
        return EnvWorker(
            rank, envs[rank], obs, actions, experience, stop,
            num_action_chunks=H, seed=rank, auto_reset=auto_reset, timeout_s=timeout_s,
        )  # fmt: skip

    def rollout(rank: int) -> RolloutWorker:
        ranks = range(rank * per_rollout, (rank + 1) * per_rollout)
        return RolloutWorker(
            actors[rank], obs, actions, weights,
            sources=[(r, stage) for r in ranks for stage in range(len(envs[r]))],
            generator=torch_generator(rank, "rollout"), timeout_s=timeout_s, offload=offload,
        )  # fmt: skip

    def learner() -> LearnerWorker:
        away_from = torch.device("cpu") if offload else None
        return LearnerWorker(algorithm, experience, weights, stop, offload_from=away_from)

    return Crew(
        env=Group("env", [lambda r=r: env(r) for r in range(len(envs))], channels=channels, stop=stop),
        rollout=Group("rollout", [lambda r=r: rollout(r) for r in range(len(actors))], channels=channels, stop=stop),
        learner=Group("learner", [learner], channels=channels, stop=stop),
        stop=stop,
        weights=weights,
    )


def build_crew_on(
    runtime: Any,
    layout: Layout,
    envs: list[list[Callable[[], Any]]],
    actor: Callable[[], Any],
    algorithm: Callable[[], Any],
    *,
    name: str = "",
    learner_ranks: Callable[[int], Any] = lambda rank: ONE_RANK,
    timeout_s: float = 30.0,
) -> Crew:
    """As `build_crew`, on any runtime: everything is made where it works."""
    sources = [(rank, stage) for rank, stages in enumerate(envs) for stage in range(len(stages))]
    answered_by = {source: layout.rollout[layout.answerer(source)] for source in sources}
    obs = runtime.channel(f"{name} obs", answered_by)
    actions = runtime.channel(f"{name} actions", {source: layout.env[source[0]] for source in sources})
    experience = runtime.channel(f"{name} experience", dict(enumerate(layout.learner)), confirm=True)
    weights, stop = runtime.weights(f"{name} policy", layout.rollout), runtime.flag()
    channels = (obs, actions, experience)

    def env(rank: int) -> EnvWorker:
        return EnvWorker(
            rank, [make() for make in envs[rank]], obs, actions, experience, stop,
            num_action_chunks=H, seed=rank, timeout_s=timeout_s,
            learners=[layout.learners_of((rank, stage)) for stage in range(len(envs[rank]))],
        )  # fmt: skip

    def rollout(rank: int) -> RolloutWorker:
        return RolloutWorker(
            actor(), obs, actions, weights, sources=[source for source in sources if layout.answerer(source) == rank],
            generator=torch_generator(rank, "rollout"), timeout_s=timeout_s,
        )  # fmt: skip

    def learner(rank: int) -> LearnerWorker:
        return LearnerWorker(algorithm(), experience, weights, stop, ranks=learner_ranks(rank))

    def group(name: str, build: Any, hosts: tuple[int, ...]) -> Any:
        builders = [partial(build, rank) for rank in range(len(hosts))]
        return runtime.group(name, builders, hosts, channels=channels, stop=stop)

    crew = (group("env", env, layout.env), group("rollout", rollout, layout.rollout))
    return Crew(*crew, group("learner", learner, layout.learner), stop, weights)


def build_evaluator(envs: list[list[Any]], actor: Any, weights: Weights, **settings: Any) -> Evaluator:
    """An evaluator over `envs`, as `build_crew`."""
    crew = build_crew(envs, [actor], CountingAlgorithm(), weights=weights)
    return Evaluator(crew.env, crew.rollout, weights, **settings)


def failing_at(call: int, error: BaseException) -> Callable[[], None]:
    """A hook that raises `error` at its `call`-th call."""
    calls = iter(range(1, call + 1))

    def hook() -> None:
        if next(calls, call + 1) == call:
            raise error

    return hook


def slow(seconds: float) -> Callable[[], None]:
    """A hook that takes its time."""
    return lambda: time.sleep(seconds)
