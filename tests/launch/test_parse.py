"""Errors are compared word for word: they are what a person with a typo gets to read."""

from pathlib import Path
from textwrap import dedent

import pytest

from rlinf.core.errors import ConfigError
from rlinf.launch.algorithm_config import PpoConfig
from rlinf.launch.cluster_config import ClusterConfig, node_groups_of, resolve_backend
from rlinf.launch.config import Root, updates_per_step
from rlinf.launch.parse import load_config
from rlinf.runtime.placement import Node, NodeGroup, make_plan

RECIPE = """\
    # A recipe for these tests.
    defaults:
      - env@env.train: reach
      - model@actor.model: mlp_policy
      - _self_
      - profile/demo: null

    runner:
      logger: {log_path: somewhere, experiment_name: demo}
      max_epochs: 8

    algorithm:
      gamma: 0.9
      entropy_tuning:
        optim:
          lr: 1.0e-3
    """

PPO_RECIPE = """\
    defaults:
      - env@env.train: reach
      - _self_

    algorithm: {loss_type: actor_critic, adv_type: gae, update_epoch: 3}
    actor:
      micro_batch_size: 8
      global_batch_size: 8
      optim: {value_lr: 1.0e-4}
      model: {model_type: mlp_policy}
    """

FILES = {
    "demo.yaml": RECIPE,
    "derived.yaml": """\
        defaults:
          - demo
          - override model@actor.model: flow_policy
          - _self_

        actor:
          global_batch_size: 1024
        """,
    "env/reach.yaml": """\
        # Line 1 of another file.
        env_type: reach
        total_num_envs: 4
        max_steps_per_rollout_epoch: 10
        """,
    "model/mlp_policy.yaml": "model_type: mlp_policy\nhidden_dims: [8, 8]\n",
    "model/flow_policy.yaml": "model_type: flow_policy\nd_model: 8\n",
    "profile/demo/cpu.yaml": "# @package _global_\nrunner:\n  max_epochs: 3\nactor:\n  global_batch_size: 512\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(dedent(text))
    return tmp_path


def load(folder: Path, *overrides: str, name: str = "demo", has_gpu: bool = True) -> Root:
    return load_config(name, overrides, folder, has_gpu=lambda: has_gpu)


def problems(folder: Path, *overrides: str, name: str = "demo") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, *overrides, name=name)
    return str(caught.value).splitlines()


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(dedent(text))


# ---- what works


def test_values_come_from_files_groups_and_defaults(folder: Path) -> None:
    root = load(folder)
    assert root.runner.logger.log_path == "somewhere"
    assert root.env.train.total_num_envs == 4
    assert root.actor.model.model_type == "mlp_policy"
    assert root.actor.model.hidden_dims == (8, 8)
    assert root.algorithm.tau == 0.005


def test_an_override_sets_a_value_that_no_file_mentions(folder: Path) -> None:
    assert load(folder, "algorithm.tau=0.1").algorithm.tau == 0.1
    assert load(folder, "+algorithm.tau=0.1").algorithm.tau == 0.1
    assert load(folder, "++algorithm.gamma=0.5").algorithm.gamma == 0.5


def test_the_last_of_two_overrides_wins(folder: Path) -> None:
    assert load(folder, "algorithm.gamma=0.5", "algorithm.gamma=0.6").algorithm.gamma == 0.6


def test_a_removed_key_falls_back_to_its_default(folder: Path) -> None:
    assert load(folder, "~algorithm.gamma").algorithm.gamma == 0.99


def test_a_section_can_be_overridden_as_a_whole(folder: Path) -> None:
    root = load(folder, "algorithm.demo_buffer={load_path: demos, fraction: 0.25}")
    assert root.algorithm.demo_buffer is not None
    assert root.algorithm.demo_buffer.fraction == 0.25


def test_a_group_can_be_chosen(folder: Path) -> None:
    model = load(folder, "model@actor.model=flow_policy", "actor.model.d_model=16").actor.model
    assert (model.model_type, model.d_model) == ("flow_policy", 16)


def test_interpolations_are_resolved(folder: Path) -> None:
    root = load(folder, "algorithm.replay_buffer.storage_dir=${runner.logger.log_path}/replay")
    assert root.algorithm.replay_buffer.storage_dir == "somewhere/replay"


@pytest.mark.parametrize(
    ("overrides", "has_gpu", "profile", "epochs"),
    [
        ((), True, "gpu", 8),
        ((), False, "cpu", 3),
        (("profile=auto",), False, "cpu", 3),
        (("profile=cpu",), True, "cpu", 3),
        (("profile=gpu",), False, "gpu", 8),
        (("profile=cpu", "runner.max_epochs=5"), True, "cpu", 5),
    ],
)
def test_the_profile_lays_sizes_over_the_recipe(
    folder: Path, overrides: tuple[str, ...], has_gpu: bool, profile: str, epochs: int
) -> None:
    root = load(folder, *overrides, has_gpu=has_gpu)
    assert (root.profile, root.runner.max_epochs) == (profile, epochs)


def test_a_derived_recipe_inherits_the_profile_and_keeps_its_own_values(folder: Path) -> None:
    root = load(folder, "profile=cpu", name="derived")
    assert (root.runner.max_epochs, root.actor.global_batch_size) == (3, 1024)


def test_a_resolved_configuration_says_its_profile_itself(folder: Path) -> None:
    import yaml

    resolved = load(folder, "profile=cpu")
    write(folder, "config.yaml", yaml.safe_dump(resolved.model_dump(mode="json")))
    assert load(folder, name="config", has_gpu=True) == resolved


# ---- aliases


@pytest.mark.parametrize("override", ["algorithm.adv_type=embodied_sac", "+algorithm.adv_type=embodied_sac"])
def test_adv_type_is_loss_type(folder: Path, override: str) -> None:
    assert load(folder, override).algorithm.loss_type == "embodied_sac"


def test_fixed_alpha_is_fixed(folder: Path) -> None:
    assert (
        load(folder, "algorithm.entropy_tuning.alpha_type=fixed_alpha").algorithm.entropy_tuning.alpha_type == "fixed"
    )


def test_cache_size_counts_trajectories_of_all_envs_and_steps(folder: Path) -> None:
    capacity = load(folder, "algorithm.replay_buffer.cache_size=6").algorithm.replay_buffer.capacity
    assert capacity == 6 * 4 * 10  # trajectories x environments x steps per segment


def test_a_typed_alias_beats_our_key_in_a_file(folder: Path) -> None:
    write(folder, "more.yaml", "defaults: [demo, _self_]\nalgorithm: {replay_buffer: {capacity: 7}}\n")
    root = load(folder, "algorithm.replay_buffer.cache_size=1", name="more")
    assert root.algorithm.replay_buffer.capacity == 40


def test_an_alias_that_contradicts_our_key_is_an_error(folder: Path) -> None:
    write(
        folder,
        "two.yaml",
        """\
        defaults: [demo, _self_]
        algorithm:
          replay_buffer:
            capacity: 100
            cache_size: 1
        """,
    )
    assert problems(folder, name="two") == [
        "configuration 'two' has 1 problem:",
        "  algorithm.replay_buffer.cache_size says 40, but algorithm.replay_buffer.capacity says 100; keep one of them"
        "   [two.yaml:5]",
    ]


def test_an_error_in_an_alias_names_what_was_written(folder: Path) -> None:
    write(folder, "odd.yaml", "defaults: [demo, _self_]\nalgorithm:\n  adv_type: grpo\n")
    assert problems(folder, name="odd") == [
        "configuration 'odd' has 1 problem:",
        "  algorithm.loss_type = 'grpo': choose embodied_sac or actor_critic   [odd.yaml:3]",
    ]


def test_the_advantages_of_ppo_are_no_alias(folder: Path) -> None:
    write(folder, "odd.yaml", "defaults: [demo, _self_]\nalgorithm:\n  adv_type: gae\n")
    assert problems(folder, name="odd") == [
        "configuration 'odd' has 1 problem:",
        "  algorithm.adv_type: not a key of loss_type: embodied_sac   [odd.yaml:3]",
    ]


def test_the_mlp_policy_of_ppo_has_a_value_function(folder: Path) -> None:
    write(folder, "ppo.yaml", PPO_RECIPE)
    root = load(folder, name="ppo")
    assert isinstance(root.algorithm, PpoConfig)
    assert root.actor.model.model_type == "mlp_actor_critic"
    assert root.actor.critic_optim.lr == 1e-4
    assert updates_per_step(root) == 3 * 5  # three passes over 40 decisions in minibatches of 8


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("algorithm.tau=0.1", "algorithm.tau: not a key of loss_type: actor_critic"),
        ("rollout.noise_correlation=0.5", "rollout.noise_correlation: PPO needs the true density"),
        ("actor.global_batch_size=4000", "actor.global_batch_size (4000) is more than the 40 decisions"),
        ("actor.model.model_type=flow_policy", "PPO needs a value function, which flow_policy has not"),
        ("algorithm.kl_beta=0.1", "algorithm.kl_beta: not used here; no loss here has such a term"),
    ],
)
def test_what_ppo_refuses(folder: Path, override: str, text: str) -> None:
    write(folder, "ppo.yaml", PPO_RECIPE)
    assert any(text in line for line in problems(folder, override, name="ppo"))


# ---- what is refused


def test_all_problems_are_told_at_once_with_their_places(folder: Path) -> None:
    write(
        folder,
        "wrong.yaml",
        """\
        defaults:
          - demo
          - _self_
        algoritm: {tau: 1}
        algorithm:
          gama: 0.9
          tau: 2
          entropy_tuning:
            optim:
              clip_gradd: 1
        actor:
          optim:
            lr: fast
        """,
    )
    found = problems(folder, "actor.model.hiden_dims=[3]", "algorithm.clip_grad=1", name="wrong")
    assert found[0] == "configuration 'wrong' has 7 problems:"
    assert sorted(found[1:]) == sorted(
        [
            "  algorithm.tau = 2: should be less than or equal to 1   [wrong.yaml:7]",
            "  algorithm.entropy_tuning.optim.clip_gradd: unknown key; did you mean "
            "algorithm.entropy_tuning.optim.clip_grad?   [wrong.yaml:10]",
            "  algorithm.gama: unknown key; did you mean algorithm.gamma?   [wrong.yaml:6]",
            "  algorithm.clip_grad: unknown key; did you mean actor.optim.clip_grad?"
            "   [command line: algorithm.clip_grad=1]",
            "  actor.optim.lr = 'fast': should be a valid number, unable to parse string as a number   [wrong.yaml:13]",
            "  actor.model.hiden_dims: unknown key; did you mean actor.model.hidden_dims?"
            "   [command line: actor.model.hiden_dims=[3]]",
            "  algoritm: unknown key; did you mean algorithm?   [wrong.yaml:4]",
        ]
    )


def test_the_line_is_that_of_the_file_which_was_merged_last(folder: Path) -> None:
    write(folder, "env/reach.yaml", "env_type: reach\ntotal_num_envs: 4\nseeed: 3\n")
    assert problems(folder)[1:] == ["  env.train.seeed: unknown key; did you mean env.train.seed?   [env/reach.yaml:3]"]
    write(folder, "profile/demo/cpu.yaml", "# @package _global_\nenv:\n  train:\n    seeed: 3\n")
    assert problems(folder, "profile=cpu")[1:] == [
        "  env.train.seeed: unknown key; did you mean env.train.seed?   [profile/demo/cpu.yaml:4]"
    ]


def test_equal_leaf_names_are_told_apart(folder: Path) -> None:
    write(
        folder,
        "two.yaml",
        """\
        defaults: [demo, _self_]
        actor:
          optim: {lr: 1.0}
          critic_optim:
            lr: -1.0
        """,
    )
    assert problems(folder, name="two")[1:] == [
        "  actor.critic_optim.lr = -1.0: should be greater than 0   [two.yaml:5]"
    ]


def test_a_key_of_another_model_is_named_as_such(folder: Path) -> None:
    assert problems(folder, "actor.model.denoising_steps=3")[1:] == [
        "  actor.model.denoising_steps: not a key of model_type: mlp_policy"
        "   [command line: actor.model.denoising_steps=3]"
    ]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "actor.model.model_type=mlp_polcy",
            "actor.model.model_type = 'mlp_polcy': did you mean mlp_policy? choose flow_policy, mlp_policy, "
            "cnn_policy, mlp_actor_critic, dsrl_flow or openpi",
        ),
        ("algorithm.agg_q=max", "algorithm.agg_q = 'max': choose min or mean"),
        (
            "algorithm.num_updates_per_step=64",
            "algorithm.num_updates_per_step: not used here; write algorithm.update_epoch, the gradient updates per "
            "global step",
        ),
        (
            "actor.fsdp_config.sharding_strategy=no_shard",
            "actor.fsdp_config.sharding_strategy: not used here; write actor.fsdp_config.strategy: ddp for no_shard, "
            "fsdp2 for the others",
        ),
        ("actor.model=null", "actor.model = None: should be a section with keys of its own"),
        ("algorithm.demo_buffer={}", "algorithm.demo_buffer.load_path: this key is required and has no value"),
    ],
)
def test_wrong_choices_and_foreign_keys_say_what_to_write(folder: Path, override: str, text: str) -> None:
    assert problems(folder, override)[1:] == [f"  {text}   [command line: {override}]"]


def test_a_list_element_is_named_by_its_position(folder: Path) -> None:
    write(folder, "logs.yaml", "defaults: [demo, _self_]\nrunner:\n  logger:\n    logger_backends:\n    - tensorbord\n")
    assert problems(folder, name="logs")[1:] == [
        "  runner.logger.logger_backends.0 = 'tensorbord': did you mean tensorboard? choose tensorboard, wandb or "
        "swanlab   [logs.yaml:5]"
    ]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["foo"], "command line: 'foo' is no override; write key=value (quote it if it has spaces or braces)"),
        (
            ["algorithm.gamma=0.9,0.8"],
            "command line: 'algorithm.gamma=0.9,0.8' would start several runs; start one each",
        ),
        (["profile=tpu"], "command line: profile=tpu: choose auto, cpu or gpu"),
        (
            ["model@actor.model=mlp"],
            "configuration 'demo': there is no 'mlp' in model; did you mean mlp_policy?",
        ),
        (
            ["env@env.train=pong"],
            "configuration 'demo': there is no 'pong' in env; there are: reach",
        ),
        (
            ["~algorithm.gama"],
            "configuration 'demo': Could not delete from config. 'algorithm.gama' does not exist.",
        ),
        (
            ["algorithm.tau=${runner.nothing}"],
            "configuration 'demo': algorithm.tau: Interpolation key 'runner.nothing' not found",
        ),
        (
            ["algorithm.tau=???"],
            "configuration 'demo': algorithm.tau: Missing mandatory value: tau",
        ),
    ],
)
def test_what_cannot_be_composed_is_one_line(folder: Path, overrides: list[str], text: str) -> None:
    assert problems(folder, *overrides) == [text]


def test_an_unknown_recipe_is_answered_with_the_nearest(folder: Path) -> None:
    assert problems(folder, name="dmo") == [f"no configuration named 'dmo' in {folder}; did you mean demo?"]
    assert problems(folder, name="xyz") == [f"no configuration named 'xyz' in {folder}; there are: demo, derived"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path / "no") == [f"there is no configuration folder {tmp_path / 'no'}"]


def test_broken_yaml_is_one_line_with_its_place(folder: Path) -> None:
    write(folder, "env/reach.yaml", "env_type: reach\n  total_num_envs: 4\n")
    assert problems(folder) == [
        "configuration 'demo': env/reach.yaml:2: not valid YAML: mapping values are not allowed here"
    ]
    write(folder, "demo.yaml", "runner: [1, 2\n")
    [text] = problems(folder)
    assert text.startswith("configuration 'demo': demo.yaml:2: not valid YAML: ")


def test_a_key_that_is_written_twice_is_an_error(folder: Path) -> None:
    write(folder, "env/reach.yaml", "env_type: reach\nseed: 1\nseed: 2\n")
    assert problems(folder) == ["configuration 'demo': env/reach.yaml:3: not valid YAML: found duplicate key seed"]


# ---- sections that do not fit each other


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["actor.model.num_action_chunks=4", "env.train.max_episode_steps=40"],
            "env.train.max_steps_per_rollout_epoch (10) is not a multiple of actor.model.num_action_chunks (4); "
            "write 8 or 12   [env/reach.yaml:4]",
        ),
        (
            ["env.train.max_episode_steps=15", "actor.model.num_action_chunks=10"],
            "env.train.max_episode_steps (15) is not a multiple of actor.model.num_action_chunks (10); write 10 or 20"
            "   [command line: env.train.max_episode_steps=15]",
        ),
        (
            ["actor.micro_batch_size=100"],
            "actor.global_batch_size (256) is not a multiple of actor.micro_batch_size (100); write 64 or 128"
            "   [command line: actor.micro_batch_size=100]",
        ),
        (
            ["env.train.num_workers=3"],
            "env.train.total_num_envs (4) is not a multiple of env.train.num_workers (3); write 2 or 4"
            "   [command line: env.train.num_workers=3]",
        ),
        (
            ["rollout.pipeline_stage_num=3"],
            "env.train.total_num_envs (4) is not a multiple of rollout.pipeline_stage_num (3); write 3 or 6"
            "   [env/reach.yaml:3]",
        ),
        (
            ["algorithm.critic_subsample_size=3"],
            "algorithm.critic_subsample_size (3) is more than actor.model.num_q_heads (2); lower it to 2, add "
            "heads, or set algorithm.subsample_with_replacement: True"
            "   [command line: algorithm.critic_subsample_size=3]",
        ),
        (
            ["algorithm.demo_buffer={load_path: d, fraction: 0.001}"],
            "algorithm.demo_buffer.fraction (0.001) of actor.global_batch_size (256) leaves no sample of one kind; "
            "bring it nearer to 0.5   [command line: algorithm.demo_buffer={load_path: d, fraction: 0.001}]",
        ),
        (
            [
                "cluster.component_placement='env,rollout: 0; actor: 0-1'",
                "actor.micro_batch_size=128",
                "algorithm.demo_buffer={load_path: d, fraction: 0.003}",
            ],
            "algorithm.demo_buffer.fraction (0.003) of actor.global_batch_size (256), shared by the 2 processes of "
            "actor, leaves no sample of one kind; bring it nearer to 0.5 or raise the batch"
            "   [command line: algorithm.demo_buffer={load_path: d, fraction: 0.003}]",
        ),
        (
            ["algorithm.replay_buffer.min_buffer_size=10", "algorithm.replay_buffer.capacity=5"],
            "algorithm.replay_buffer.min_buffer_size (10) is more than algorithm.replay_buffer.capacity (5): training "
            "would never begin; raise the capacity   [command line: algorithm.replay_buffer.min_buffer_size=10]",
        ),
        (
            ["runner.val_check_interval=2"],
            "runner.val_check_interval asks for evaluation, but there is no env.eval; add it or set "
            "runner.val_check_interval=-1   [command line: runner.val_check_interval=2]",
        ),
        (
            ["runner.only_eval=True", "runner.ckpt_path=somewhere"],
            "runner.only_eval asks for evaluation, but there is no env.eval; add it or set runner.only_eval=False"
            "   [command line: runner.only_eval=True]",
        ),
        (
            ["runner.only_eval=True", "+env@env.eval=reach", "env.eval.max_steps_per_rollout_epoch=20"],
            "runner.only_eval needs something to evaluate; give runner.ckpt_path (or runner.resume_dir) a checkpoint"
            "   [command line: runner.only_eval=True]",
        ),
        (
            ["+env@env.eval=reach"],
            "env.eval.max_steps_per_rollout_epoch (10) is less than env.eval.max_episode_steps (20): no episode would "
            "come to its end; raise it   [env/reach.yaml:4]",
        ),
        (
            ["env.train.video_cfg.save_video=True"],
            "env.train.video_cfg.save_video: only evaluation is filmed; write it under env.eval"
            "   [command line: env.train.video_cfg.save_video=True]",
        ),
        (
            ["runner.resume_dir=a", "runner.ckpt_path=b"],
            "runner.ckpt_path takes only weights and runner.resume_dir takes everything; give one of them"
            "   [command line: runner.ckpt_path=b]",
        ),
        (
            ["cluster.backend=local", "cluster.address=10.0.0.1:6379"],
            "cluster.address (10.0.0.1:6379) names a Ray cluster to join, and cluster.backend: local joins none; write "
            "ray or auto, or remove the address   [command line: cluster.address=10.0.0.1:6379]",
        ),
        (
            ["cluster.backend=local", "cluster.num_nodes=2"],
            "cluster.backend: local runs one process of each role on one machine and accelerator 0, but "
            "cluster.num_nodes is 2; write ray or auto   [command line: cluster.backend=local]",
        ),
        (
            ["cluster.backend=local", "cluster.component_placement='env: 0-1; actor,rollout: 0'"],
            "cluster.backend: local runs one process of each role on one machine and accelerator 0, but env has 2 "
            "processes; write ray or auto   [command line: cluster.backend=local]",
        ),
        (
            ["cluster.component_placement={env: 0-3, actor: 4}"],
            "cluster.component_placement leaves out rollout; add for example rollout: 0"
            "   [command line: cluster.component_placement={env: 0-3, actor: 4}]",
        ),
        (
            ["cluster.component_placement='env,rolout: 0'"],
            "cluster.component_placement: 'rolout' is no role; did you mean rollout?"
            "   [command line: cluster.component_placement='env,rolout: 0']",
        ),
        (
            ["cluster.component_placement='env,actor: 0; env,rollout: all'"],
            "cluster.component_placement places env twice (0 and all); keep one"
            "   [command line: cluster.component_placement='env,actor: 0; env,rollout: all']",
        ),
        (
            ["cluster.component_placement='env: 0-2; actor,rollout: 0'"],
            "env.train.total_num_envs (4) is not a multiple of the 3 processes of env; write 3 or 6"
            "   [env/reach.yaml:3]",
        ),
        (
            ["cluster.component_placement='env: 0-1; actor,rollout: 0'", "rollout.pipeline_stage_num=4"],
            "env.train.total_num_envs (4) is not a multiple of the 2 processes of env x rollout.pipeline_stage_num "
            "(4); write 8   [env/reach.yaml:3]",
        ),
        (
            ["cluster.component_placement='env: 0-1; actor,rollout: 0'", "env.train.num_workers=4"],
            "env.train.total_num_envs (4) / the 2 processes of env is not a multiple of env.train.num_workers (4); "
            "write 2   [command line: env.train.num_workers=4]",
        ),
        (
            ["cluster.component_placement='env,rollout: 0; actor: 0-2'"],
            "actor.global_batch_size (256) cannot be shared evenly by the 3 processes of actor; write 255 or 258",
        ),
        (
            ["cluster.component_placement='env,rollout: 0; actor: 0-3'"],
            "actor.global_batch_size (256) is not a multiple of actor.micro_batch_size (256) x the 4 processes of "
            "actor; write 64",
        ),
        (
            ["cluster.component_placement='env,rollout: 0; actor: 0-7'", "actor.micro_batch_size=32"],
            "cluster.component_placement gives actor 8 processes, but there are only 4 environments to learn from; "
            "raise env.train.total_num_envs or give actor fewer"
            "   [command line: cluster.component_placement='env,rollout: 0; actor: 0-7']",
        ),
        (
            ["cluster.component_placement='env,actor: 0; rollout: 0-2'", "rollout.pipeline_stage_num=2"],
            "cluster.component_placement gives rollout 3 processes, but env has 2 to ask them (processes of env: 1, "
            "rollout.pipeline_stage_num: 2); write rollout.pipeline_stage_num: 3 or give rollout at most 2"
            "   [command line: cluster.component_placement='env,actor: 0; rollout: 0-2']",
        ),
        (
            ["cluster.node_groups=[{label: arm, node_ranks: 1}]"],
            "cluster.node_groups: arm needs node 1, but the run has 1 node (0); correct node_ranks or raise "
            "cluster.num_nodes   [command line: cluster.node_groups=[{label: arm, node_ranks: 1}]]",
        ),
        (
            ["cluster.component_placement={env: {node_group: arm, placement: 0}, actor: 0, rollout: 0}"],
            "cluster.component_placement: env: no node group is called 'arm'; there are: cluster, node"
            "   [command line: cluster.component_placement={env: {node_group: arm, placement: 0}, actor: 0, "
            "rollout: 0}]",
        ),
    ],
)
def test_impossible_combinations_name_both_keys_and_the_remedy(folder: Path, overrides: list[str], text: str) -> None:
    assert problems(folder, *overrides)[1:] == [f"  {text}"]


def test_a_learned_temperature_cannot_start_at_zero(folder: Path) -> None:
    assert problems(folder, "algorithm.entropy_tuning.initial_alpha=0")[1:] == [
        "  algorithm.entropy_tuning: initial_alpha must be positive with alpha_type softplus; or write "
        "alpha_type: fixed   [demo.yaml:14]"
    ]
    fixed = load(
        folder, "algorithm.entropy_tuning.initial_alpha=0", "algorithm.entropy_tuning.alpha_type=fixed"
    ).algorithm.entropy_tuning
    assert fixed.initial_alpha == 0


def test_roles_may_be_placed_together_as_a_mapping_or_as_text(folder: Path) -> None:
    for value in ("{env: 0, rollout: all, actor: 0}", "'env:0;rollout,actor:all'", "'actor,env,rollout: 0'"):
        cluster = load(folder, f"cluster.component_placement={value}").cluster
        plan = make_plan(cluster.component_placement, [Node(0)], node_groups_of(cluster))
        assert all(plan.world_size(role) == 1 for role in ("actor", "env", "rollout"))
        assert resolve_backend(cluster, plan) == "local"


# ---- several machines

CLUSTER = """\
    defaults: [demo, _self_]
    cluster:
      num_nodes: 3
      component_placement:
        actor,rollout: {node_group: 4090, placement: all}
        env:
          node_group: franka
          placement: 0-1
      node_groups:
        - label: 4090
          node_ranks: 0
          env_configs:
            - node_ranks: 0
              python_interpreter_path: /opt/venv/bin/python
              env_vars:
                - IFACE: eth0
                - LEVEL: 2
        - label: franka
          node_ranks: 1-2
          env_configs:
            - {node_ranks: [1, 2], env_vars: {IFACE: eno1}}
          hardware:
            type: Franka
            configs:
              - {robot_ip: 172.16.0.2, node_rank: 1}
              - {robot_ip: 172.16.0.3, node_rank: 2}
    """


def test_machines_and_robots_are_written_as_groups_of_nodes(folder: Path) -> None:
    write(folder, "robots.yaml", CLUSTER)
    root = load(folder, name="robots")
    assert node_groups_of(root.cluster) == (
        NodeGroup("4090", (0,), {0: {"IFACE": "eth0", "LEVEL": "2"}}, {0: "/opt/venv/bin/python"}),
        NodeGroup(
            "franka",
            (1, 2),
            {1: {"IFACE": "eno1"}, 2: {"IFACE": "eno1"}},
            hardware=(("Franka", 1, "172.16.0.2"), ("Franka", 2, "172.16.0.3")),
        ),
    )
    [first, second] = node_groups_of(root.cluster)
    assert (first.env_vars, first.python_interpreter) == (
        {0: {"IFACE": "eth0", "LEVEL": "2"}},
        {0: "/opt/venv/bin/python"},
    )
    assert second.env_vars == {1: {"IFACE": "eno1"}, 2: {"IFACE": "eno1"}}
    assert Root.model_validate(root.model_dump(mode="json")) == root
    nodes = [Node(0, num_accelerators=1), Node(1), Node(2)]
    plan = make_plan(root.cluster.component_placement, nodes, node_groups_of(root.cluster))
    assert [(process.node_rank, process.hardware) for process in plan.processes["env"]] == [
        (1, "172.16.0.2"),
        (2, "172.16.0.3"),
    ]
    assert plan.processes["actor"][0].python == "/opt/venv/bin/python"
    assert resolve_backend(root.cluster, plan) == "ray"


@pytest.mark.parametrize(
    ("wrong", "right", "text"),
    [
        ("node_ranks: 1-2", "node_ranks: 2-1", "cluster.node_groups.1.node_ranks = '2-1': node ranks: 2-1 runs "
         "backwards; write 1-2   [robots.yaml:19]"),
        ("node_ranks: 1-2", "node_ranks: []", "cluster.node_groups.1.node_ranks = []: node ranks: no rank is named; "
         "write for example 0, 0-3 or 0-3,5   [robots.yaml:19]"),
        ("robot_ip", "robot_pi", "cluster.node_groups.1.hardware.configs.0.robot_pi: unknown key; did you mean "
         "cluster.node_groups.1.hardware.configs.0.robot_ip?   [robots.yaml:25]"),
        ("LEVEL: 2", "LEVEL: true", "cluster.node_groups.0.env_configs.0.env_vars = [{'IFACE': 'eth0'}, {'LEVEL': "
         "True}]: LEVEL should be text or a number; put it in quotes   [robots.yaml:15]"),
        ("type: Franka", "type: franka", "cluster.node_groups.1.hardware.type = 'franka': did you mean Franka? choose "
         "Franka   [robots.yaml:23]"),
        ("label: franka", "label: node", "cluster.node_groups: node is a reserved label; choose another"
         "   [robots.yaml:9]"),
        ("placement: 0-1", "placement: 0-2", "cluster.component_placement: env: 0-2 needs robot 2, but node group "
         "franka has 2; stay below 2 or add robots to its hardware.configs   [robots.yaml:4]"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_groups_of_nodes(folder: Path, wrong: str, right: str, text: str) -> None:
    write(folder, "robots.yaml", CLUSTER.replace(wrong, right, 1))
    assert f"  {text}" in problems(folder, name="robots")


@pytest.mark.parametrize(
    ("accelerators", "placement", "backend", "expected"),
    [
        (0, "actor,env,rollout: all", "auto", "local"),
        (1, "actor,env,rollout: all", "auto", "local"),
        (1, "actor,env,rollout: 0", "local", "local"),
        (1, "actor,env,rollout: 0", "ray", "ray"),
        (2, "actor,env,rollout: 0", "auto", "local"),
        (2, "actor,env,rollout: all", "auto", "ray"),
        (2, "actor,env: 0; rollout: 1", "auto", "ray"),
        (2, "actor,env,rollout: 1", "auto", "ray"),
        (0, "actor,rollout: 0; env: 0:0-1", "auto", "ray"),
    ],
)
def test_ray_is_for_what_one_process_cannot_do(accelerators: int, placement: str, backend: str, expected: str) -> None:
    cluster = ClusterConfig(component_placement=placement, backend=backend)  # type: ignore[arg-type]
    plan = make_plan(placement, [Node(0, num_accelerators=accelerators)])
    assert resolve_backend(cluster, plan) == expected


def test_several_nodes_or_an_environment_of_its_own_need_ray() -> None:
    placement = "actor,env,rollout: 0"
    assert resolve_backend(ClusterConfig(num_nodes=2), make_plan(placement, [Node(0), Node(1)])) == "ray"
    group = NodeGroup("a", (0,), {0: {"A": "1"}})
    plan = make_plan({"actor,env,rollout": {"node_group": "a", "placement": 0}}, [Node(0)], [group])
    assert resolve_backend(ClusterConfig(), plan) == "ray"


@pytest.mark.parametrize(
    ("placement", "reason"),
    [
        ("actor,env,rollout: all", "actor has 2 processes"),
        ("actor,env: 0; rollout: 1", "the roles are on accelerators 0, 1"),
        ("actor,env,rollout: 1", "the roles are on accelerator 1"),
    ],
)
def test_what_the_local_backend_does_not_do_is_an_error_once_the_nodes_are_known(placement: str, reason: str) -> None:
    cluster = ClusterConfig(component_placement=placement, backend="local")
    with pytest.raises(ConfigError) as caught:
        resolve_backend(cluster, make_plan(placement, [Node(0, num_accelerators=2)]))
    assert str(caught.value) == (
        "cluster.backend: local runs one process of each role on one machine and accelerator 0, but "
        f"{reason}; write ray or auto"
    )


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("actor.device=cuda", "actor.device: unknown key; actor has group_name, seed, micro_batch_size"),
        ("algorithm.foo=1", "algorithm.foo: unknown key; algorithm has loss_type, gamma"),
        ("actor.num_threads=-3", "actor.num_threads = -3: should be greater than 0; or choose auto"),
        ("runner.logger.experiment_name=../a", "experiment_name = '../a': should be the name of one folder"),
        ("runner.logger.experiment_name=''", "experiment_name = '': should be the name of one folder"),
    ],
)
def test_a_problem_is_told_once_and_says_what_there_is(folder: Path, override: str, text: str) -> None:
    first, line = problems(folder, override)
    assert first.endswith("has 1 problem:")
    assert text in line
