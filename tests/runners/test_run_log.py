"""Under which names a global step is reported."""

from types import SimpleNamespace

from rlinf.runners.run import Run


class Told:
    def __init__(self):
        self.rows, self.notes = [], []

    def log(self, step, row):
        self.rows.append((step, row))

    def note(self, text):
        self.notes.append(text)


def run():
    crew = SimpleNamespace(progress=lambda: 0, stop=SimpleNamespace(is_set=lambda: False))
    return Run(crew, SimpleNamespace(sync_interval=1), None, Told(), None)


def test_metrics_have_the_names_that_are_documented():
    made = run()
    learned = {"ppo_loss": 1.0, "actor/total_loss": 2.0, "actor/grad_norm": 3.0, "rollout/rewards": 4.0}
    made.log(7, evaluation={"eval/return": 5.0}, episodes={"return": 6.0}, learned=learned)
    assert made.reporter.rows == [
        (
            7,
            {
                "env/return": 6.0,
                "eval/return": 5.0,
                "train/ppo_loss": 1.0,
                "actor/total_loss": 2.0,
                "train/actor/grad_norm": 3.0,
                "rollout/rewards": 4.0,
            },
        )
    ]
    assert made.reporter.notes == []


def test_demonstrations_that_outweigh_the_reward_are_told_with_the_remedy():
    made = run()
    made.log(7, evaluation={}, learned={"loss_ratio": 9e4})
    assert made.reporter.notes == []
    made.log(8, evaluation={}, learned={"loss_ratio": 2e5})
    assert made.reporter.notes == [
        "train/loss_ratio is 2e+05: demonstrations outweigh the reward; lower actor.sft_loss_weight"
    ]
