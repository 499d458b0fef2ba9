"""What a recipe needs before it can begin, and makes by another recipe where it is missing."""

from __future__ import annotations

from pathlib import Path

import yaml

import rlinf
from rlinf.core.errors import CheckpointError, ConfigError
from rlinf.data.demos import meta_of, read_index
from rlinf.launch.algorithm_config import SacConfig
from rlinf.launch.config import Root
from rlinf.launch.decoders import TRAIN_COMMAND, named_decoder
from rlinf.launch.demonstrations import read_demonstrations
from rlinf.launch.parse import load_as
from rlinf.launch.pi0_policy import find_pi0
from rlinf.launch.sft_config import SftConfig
from rlinf.models.embodiment.dsrl_policy import DsrlFlowConfig, steering_keys
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig

SFT_CONFIG_DIR = "examples/sft/config"


def make_missing_decoder(config: Root) -> int:
    """Clone the decoder that a steered policy needs, by `decoder_recipe`, unless something is at `decoder_path`.

    The clone's run is kept beside the run that needs it. Returns its exit code; 0 where there was nothing to do.
    Raises ConfigError or CheckpointError where there is no decoder and no recipe for it.
    """
    model = config.actor.model
    if steering_keys(model) is None:
        return 0
    recipe = model.decoder_recipe if isinstance(model, DsrlFlowConfig) else None
    if not isinstance(model, DsrlFlowConfig) or recipe is None or Path(model.decoder_path).expanduser().exists():
        named_decoder(config).mark()  # says what is missing before there is a run
        return 0
    logger = config.runner.logger
    overrides = [
        f"runner.logger.log_path={logger.log_path}",
        f"runner.logger.logger_backends=[{','.join(logger.logger_backends)}]",
        f"runner.export_dir={model.decoder_path}",
        f"profile={config.profile}",
    ]
    from rlinf.launch.sft import run_sft

    print(f"there is no decoder in {model.decoder_path} yet; {recipe} makes it first", flush=True)
    return run_sft(load_as(SftConfig, recipe, overrides, find_sft_config_dir()))


def check_pi0(config: Root) -> None:
    """Where PPO trains pi0: its files, and the demonstrations beside it, before there is a run.

    Raises CheckpointError or DataError naming what is missing or does not fit.
    """
    model = config.actor.model
    if not isinstance(model, OpenpiConfig) or model.openpi.use_dsrl:
        return
    _say_who_makes(model)
    find_pi0(model)
    if config.actor.use_real_data_co_training and not config.runner.only_eval:
        read_demonstrations(config)


def _say_who_makes(model: OpenpiConfig) -> None:
    """Raise CheckpointError naming the recipe of stage I where its weights are not there yet."""
    weights = model.weights()
    if weights is None or weights.exists():
        return
    for recipe in sorted(find_sft_config_dir().glob("*.yaml")):
        exported = (yaml.safe_load(recipe.read_text()).get("runner") or {}).get("export_dir")
        if exported == model.model_path:
            raise CheckpointError(
                f"actor.model.model_path: {exported} is not there; stage I makes it: {TRAIN_COMMAND} {recipe.stem}"
            )


def record_missing_demos(config: Root) -> None:
    """Let the task's scripted expert record what a recipe's demonstrations lack of `scripted_episodes`.

    Raises ConfigError, DataError as `record` does.
    """
    demo = config.algorithm.demo_buffer if isinstance(config.algorithm, SacConfig) else None
    if demo is None or not demo.scripted_episodes:
        return
    folder, episodes = Path(demo.load_path).expanduser(), demo.scripted_episodes
    there = meta_of(read_index(folder)).num_episodes if folder.exists() else 0
    if there >= episodes:
        return
    from rlinf.launch.record import record

    print(f"{demo.load_path} holds {there} of {episodes} demonstrations; the scripted expert records the rest first")
    record(config, folder, episodes=episodes, noise_std=demo.scripted_noise, note=lambda line: print(line, flush=True))


def find_sft_config_dir() -> Path:
    """The folder of cloning recipes in the working directory or in the checkout that this package belongs to."""
    for root in (Path.cwd(), Path(rlinf.__file__).parents[1]):
        if (root / SFT_CONFIG_DIR).is_dir():
            return root / SFT_CONFIG_DIR
    raise ConfigError(f"no folder {SFT_CONFIG_DIR} here; start in the checkout")
