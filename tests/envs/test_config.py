import pytest
from pydantic import ValidationError

from rlinf.envs.config import EnvConfig
from rlinf.envs.maniskill.config import InitParams, ManiSkillConfig, control_mode
from rlinf.envs.reach import ReachConfig


def described(config, prefix=""):
    for name, field in config.model_fields.items():
        yield prefix + name, field.description
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            yield from described(field.annotation, f"{prefix}{name}.")


@pytest.mark.parametrize("config", [EnvConfig, ManiSkillConfig, ReachConfig])
def test_every_key_is_explained(config):
    for name, description in described(config):
        assert description and description.endswith("."), name


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"total_num_envs": 3, "group_size": 2}, "must be a multiple of group_size"),
        ({"total_num_envs": 0}, "greater than 0"),
        ({"total_num_envs": 1, "init_params": {"sim_config": {"sim_freq": 90}}}, "must be a multiple of control_freq"),
        ({"total_num_envs": 1, "reward_mode": "dense", "init_params": {"reward_mode": "sparse"}}, "only one of them"),
        ({"total_num_envs": 1, "auto_rest": True}, "auto_rest"),
    ],
)
def test_impossible_combinations_are_refused(keys, words):
    with pytest.raises(ValidationError, match=words):
        ManiSkillConfig(**keys)


def test_controller_follows_from_the_policys_setup_unless_it_is_named():
    assert control_mode(InitParams(), "panda-ee-dpos") == "pd_ee_delta_pos"
    assert control_mode(InitParams(), "panda-qpos") == "pd_joint_delta_pos"
    assert control_mode(InitParams(control_mode="pd_ee_pose"), "panda-qpos") == "pd_ee_pose"
    with pytest.raises(ValueError, match="'panda-ee' stands for no ManiSkill controller; known are"):
        control_mode(InitParams(), "panda-ee")
    with pytest.raises(ValueError, match="no controller"):
        control_mode(InitParams(), None)
