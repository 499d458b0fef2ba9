import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlinf.core.errors import ConfigError, MissingDependency
from rlinf.metrics.logger import TensorBoardLogger, open_loggers


def open_one(backend, run_dir, note=print, config=None):
    [logger] = open_loggers(
        [backend],
        run_dir,
        project_name="project",
        experiment_name="experiment",
        config=config or {},
        resume_step=0,
        note=note,
    )
    return logger


def scalars(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_keeps_tags_and_steps_as_given(tmp_path):
    logger = open_one("tensorboard", tmp_path)
    logger.log(3, {"train/sac/critic_loss": 0.5, "env/success_once": 1.0}, 0.1)
    logger.log(4, {"train/sac/critic_loss": 0.25}, 0.2)
    logger.close()
    assert scalars(tmp_path) == {
        "train/sac/critic_loss": [(3, 0.5), (4, 0.25)],
        "env/success_once": [(3, 1.0)],
    }


def test_resumed_tensorboard_replaces_the_steps_that_are_played_again(tmp_path):
    for resume_step, steps in ((0, range(1, 5)), (2, range(3, 6))):
        logger = TensorBoardLogger(tmp_path, resume_step)
        for step in steps:
            logger.log(step, {"loss": 10.0 * resume_step + step}, 0.0)
        logger.close()
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0)]}


def test_unknown_backend_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"runner\.logger\.logger_backends: 'tensorbord' is none of tensorboard"):
        open_one("tensorbord", tmp_path)


@pytest.mark.parametrize("package", ["wandb", "swanlab"])
def test_missing_package_names_the_command_that_installs_it(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=rf'pip install -e "\.\[{package}\]"') as caught:
        open_one(package, tmp_path)
    assert "\n" not in str(caught.value)


class Service:
    """Stands for wandb and swanlab alike; refuses the modes in `down`."""

    def __init__(self, folder, down=()):
        self.folder, self.down, self.modes, self.logged, self.finished = folder, down, [], [], 0

    def init(self, mode, **options):
        self.modes.append(mode)
        self.options = options
        if mode in self.down:
            raise ConnectionError("no route\nto host")
        return SimpleNamespace(dir=str(self.folder / "run-1" / "files"), log=self.log, finish=self.finish)

    def Settings(self, **_):  # noqa: N802
        return SimpleNamespace(base_url="https://api.example")

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A person without credentials."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "SWANLAB_API_KEY", "SWANLAB_MODE", "SWANLAB_SAVE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SWANLAB_TERMINAL_PROXY_TYPE", "none")


@pytest.mark.parametrize("package", ["wandb", "swanlab"])
def test_without_credentials_recording_is_offline_and_says_how_to_upload(tmp_path, monkeypatch, nobody, package):
    service, notes = Service(tmp_path), []
    monkeypatch.setitem(sys.modules, package, service)
    logger = open_one(package, tmp_path, notes.append, config={"gamma": 0.8})
    logger.log(5, {"env/return": 2.0}, 1.0)
    logger.close()
    assert service.modes == ["offline"]
    assert service.options["config"] == {"gamma": 0.8}
    assert service.logged == [(5, {"env/return": 2.0})]
    assert service.finished == 1
    assert len(notes) == 1 and f"{package} login && {package} sync {tmp_path}" in notes[0]


@pytest.mark.parametrize(("package", "online"), [("wandb", "online"), ("swanlab", "cloud")])
def test_key_in_the_environment_means_online(tmp_path, monkeypatch, nobody, package, online):
    service, notes = Service(tmp_path), []
    monkeypatch.setitem(sys.modules, package, service)
    monkeypatch.setenv(f"{package.upper()}_API_KEY", "key")
    open_one(package, tmp_path, notes.append)
    assert service.modes == [online]
    assert notes == []


def test_wandb_key_in_netrc_means_online(tmp_path, monkeypatch, nobody):
    service = Service(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", service)
    (tmp_path / ".netrc").write_text("machine api.example login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    open_one("wandb", tmp_path)
    assert service.modes == ["online"]


@pytest.mark.parametrize(("package", "online"), [("wandb", "online"), ("swanlab", "cloud")])
def test_silent_server_means_offline(tmp_path, monkeypatch, nobody, package, online):
    service, notes = Service(tmp_path, down=(online,)), []
    monkeypatch.setitem(sys.modules, package, service)
    monkeypatch.setenv(f"{package.upper()}_API_KEY", "key")
    open_one(package, tmp_path, notes.append)
    assert service.modes == [online, "offline"]
    assert notes[0] == f"{package}: no connection (no route to host)"


def test_service_that_does_not_even_start_offline_is_a_configuration_error(tmp_path, monkeypatch, nobody):
    monkeypatch.setitem(sys.modules, "wandb", Service(tmp_path, down=("offline",)))
    with pytest.raises(ConfigError, match="wandb does not start: no route to host"):
        open_one("wandb", tmp_path)


def test_swanlab_gets_finite_values_only(tmp_path, monkeypatch, nobody):
    service = Service(tmp_path)
    monkeypatch.setitem(sys.modules, "swanlab", service)
    open_one("swanlab", tmp_path).log(1, {"a": float("nan"), "b": 1.0}, 0.0)
    assert service.logged == [(1, {"b": 1.0})]
