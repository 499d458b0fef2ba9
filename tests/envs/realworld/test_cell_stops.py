"""A person's stop, wherever the arm is on its way, and how the cell gets out of a hole and out of the program."""

import dataclasses

import numpy as np
import pytest

from rlinf.core.errors import RunEnding
from rlinf.envs.realworld.arm import ArmError, Compliance
from rlinf.envs.realworld.arms.fake import FakeArm
from rlinf.envs.realworld.cameras.camera import Camera, CameraError
from rlinf.envs.realworld.config import RealWorldConfig
from rlinf.envs.realworld.env import make
from rlinf.envs.realworld.pacing import RealTime, SimulatedTime
from rlinf.envs.realworld.robot_cell import RobotCell
from rlinf.envs.realworld.teleop.operator import Command, ScriptedOperator
from tests.envs.realworld.cell import DOWN, LIMITS, Clock, pose

ABOVE = (0.5, 0.0, 0.12, *DOWN)


class Stoppable(FakeArm):
    """As behind our server: stopped in one place for both gates; remembers what it was told."""

    def __init__(self, *given, **keys):
        super().__init__(*given, **keys)
        self.sent, self.resets, self.stops, self.stopped_after = [], [], 0, 0

    def stop(self, reason):
        self.stops, self.stopped_after = self.stops + 1, len(self.sent)
        self.fault = f"stopped ({reason})"

    def set_target_pose(self, target):
        super().set_target_pose(target)
        self.sent.append(target.copy())

    def joint_reset(self, q=None):
        self.resets.append(self.state().pose)
        super().joint_reset(q)


def a_cell(arm, clock, **keys):
    pace = SimulatedTime(clock, clock.advance)
    cell = RobotCell(arm, {}, LIMITS, pace, period_s=0.1, robot_wait_s=2.0, stop_wait_s=3.0, **keys)
    cell.open()
    return cell


def by_the_clock(clock, **cell):
    """An environment on a fake arm, paced by a clock that is set."""
    config = RealWorldConfig(
        pace="realtime", override_cfg={"driver": "fake", "cameras": {}, "driver_options": {"clock": clock}, **cell}
    )
    env = make(config, num_envs=1, seed=0, control_mode=None, num_workers=0, render=False)
    inner = env._simulator.cell
    inner._pace = inner.metronome.pace = RealTime(clock, clock.advance)
    env._simulator.operator = None
    inner.hold()
    return env, env._simulator, inner


def saying(*marks):
    """An operator who says these, one a reading, then nothing."""
    left = list(marks)
    return ScriptedOperator(lambda: Command(np.zeros(6), mark=left.pop(0) if left else ""))


# ---- a person's stop


def test_a_stop_on_the_way_to_an_episode_is_heard_at_once_and_told_to_the_server():
    clock = Clock()
    arm = Stoppable(clock=clock)
    cell = a_cell(arm, clock)
    asked = []
    cell.asked_to_stop = lambda: bool(asked.append(clock.now) or len(asked) == 3)
    before = len(arm.sent)
    cell.go(pose(0.42, 0.08, 0.1), 1.5)
    assert cell.gate.stopped == "person: the operator pressed stop" and len(asked) == 3
    assert len(arm.sent) - before == 4 and arm.stops == 1  # three steps, and where it then was
    np.testing.assert_allclose(arm.sent[-1], cell.state.pose)
    before, arm.fault = len(arm.sent), ""
    cell.go(pose(0.42, 0.08, 0.1), 1.5)
    assert len(arm.sent) == before
    cell.close()


def test_the_operator_is_heard_on_the_way_and_other_marks_are_not(monkeypatch):
    clock = Clock()
    env, world, cell = by_the_clock(clock)
    env.reset(0)
    env._simulator.operator = ScriptedOperator(lambda: Command(np.zeros(6), mark="success"))
    env.reset(1)
    assert not cell.gate.stopped
    sent, passed_on = [], cell.arm.set_target_pose
    monkeypatch.setattr(cell.arm, "set_target_pose", lambda target: (sent.append(target), passed_on(target)))
    world.operator = ScriptedOperator(lambda: Command(np.zeros(6), mark="stop"))
    env.reset(2)
    assert cell.gate.stopped.startswith("person") and len(sent) <= 3
    assert float(world.report()["episode/stops"]) == 1  # of this episode's way, not of the one before
    world.operator = None
    env.close()


def test_a_real_robot_that_is_stopped_on_its_way_begins_anew_once_it_is_cleared():
    clock = Clock()
    env, world, cell = by_the_clock(clock, stop_wait_s=5.0)
    cell.simulated, told = False, []
    cell.arm.stop = told.append
    world.operator = saying("", "", "stop")
    cleared = []
    clear = cell.clear_stop
    cell.clear_stop = lambda: (clear(), cleared.append(cell.gate.stopped))
    env.reset(1)
    assert len(told) == 1 and len(cleared) == 2 and not cell.gate.stopped
    start = world._draw_start(np.random.default_rng(env._episode_seed[0]))
    assert np.linalg.norm(cell.state.pose[:3] - start[:3]) < 0.005
    env.close()


def test_a_stop_takes_effect_in_its_own_step_and_the_run_waits_for_a_person():
    import torch

    clock = Clock()
    arm = Stoppable(home=ABOVE, clock=clock)
    env, world, cell = by_the_clock(clock)
    cell.arm, cell.simulated = arm, False
    cell.measure()
    cell.hold()
    env.reset(0)
    world.operator = saying("", "stop")
    env.step(torch.full((1, 1, 6), 0.5))
    here, waited = arm.state().pose, []

    def a_person_looks(due):
        clock.advance(max(due - clock.now, 0.0))
        waited.extend([due] if arm.fault else [])
        if len(waited) == 4:
            arm.fault = ""

    cell._pace.wait_until = a_person_looks
    before = len(arm.sent)
    step = env.step(torch.full((1, 1, 6), 0.5))  # and the next episode begins
    assert bool(step.terminated) and float(step.reward) == 0 and float(step.info["episode/stops"]) == 1
    assert arm.stops == 1 and len(waited) == 4 and not cell.gate.stopped
    np.testing.assert_allclose(arm.sent[before], here, atol=1e-9)  # no further than where it was
    assert arm.stopped_after == before + 1
    env.close()


def test_a_stop_is_heard_while_a_camera_or_the_robot_is_waited_for():
    clock = Clock()
    arm = Stoppable(clock=clock)
    cell = a_cell(arm, clock)
    arm.unreachable = True

    def come_back(due):
        clock.advance(due - clock.now)
        arm.unreachable = not cell.gate.stopped

    cell._pace.wait_until, cell.asked_to_stop = come_back, lambda: True
    cell.measure()
    assert cell.gate.stopped.startswith("person") and arm.stops == 1
    cell.close()


def test_what_was_pressed_before_an_episode_pays_nothing_in_it():
    import torch

    env, world, _ = by_the_clock(Clock())
    env.reset(0)
    marks = ["failure"]
    world.operator = ScriptedOperator(lambda: Command(np.zeros(6), mark=marks.pop() if marks else ""))
    env.reset(1)
    assert not marks and not bool(env.step(torch.zeros(1, 1, 6)).done)
    env.close()


# ---- the run is to end


def lost_link(cell):
    cell.arm.unreachable = True
    cell.measure()


def dead_camera(cell):
    class Dead:
        restarts = 0

        def newest(self, wait_s=0.0):
            raise CameraError("camera one: unplugged")

        close = start = lambda self: None

    cell.cameras = {"one": Dead()}
    cell.pictures()


def stopped_for_a_person(cell):
    cell.simulated = False
    cell.stop_as_asked()
    cell.clear_stop()


def on_its_way(cell):
    cell.go(pose(0.42, 0.08, 0.1), 1.5)


@pytest.mark.parametrize(
    ("wait", "said"),
    [
        (lost_link, "the robot was waited for: fake arm: unreachable"),
        (dead_camera, "camera one was waited for: camera one: unplugged"),
        (stopped_for_a_person, "a person was waited for"),
        (on_its_way, "on its way to the next episode"),
    ],
)
def test_a_run_that_is_to_end_waits_for_nothing_any_more(wait, said):
    clock = Clock()
    arm = Stoppable(clock=clock)
    cell = a_cell(arm, clock)
    began, asked = clock.now, []
    cell.asked_to_end = lambda: bool(asked.append(clock.now) or clock.now > began + 0.95)
    with pytest.raises(RunEnding, match=said):
        wait(cell)
    assert 0.95 < clock.now - began < 0.95 + 0.21 and np.diff(asked).max() < 0.21
    if wait is not lost_link:
        np.testing.assert_allclose(arm.sent[-1][:3], arm.state().pose[:3], atol=1e-4)
    if wait is stopped_for_a_person:
        assert arm.stops == 1 and cell.gate.stopped
    began = clock.now
    left = {lost_link: "let go, but: fake arm: unreachable", stopped_for_a_person: "left in error: stopped"}
    assert cell.close().startswith(left.get(wait, "held"))
    assert clock.now - began < 0.5


def test_the_arm_is_parked_although_the_run_is_to_end():
    clock = Clock()
    arm = Stoppable(clock=clock)
    cell = a_cell(arm, clock, at_end="joints")
    cell.asked_to_end = lambda: True
    assert cell.close() == "parked at the reset joints" and len(arm.resets) == 1


def test_a_step_that_ended_its_episode_counts_although_the_next_one_does_not_begin():
    import torch

    env, world, _ = by_the_clock(Clock())
    env.reset(0)
    ends = []
    env.give_up_when(lambda: bool(ends))
    world.operator = ScriptedOperator(lambda: Command(np.zeros(6), mark="failure" if not ends.append(1) else ""))
    sent = len(ends)
    step = env.step(torch.zeros(1, 1, 6))
    assert sent == 0 and bool(step.terminated) and step.obs is step.last_obs
    assert float(step.info["episode/episode_len"]) == 1
    with pytest.raises(RunEnding, match="the next episode did not begin"):
        env.step(torch.zeros(1, 1, 6))
    with pytest.raises(RunEnding):
        env.reset(1)
    world.operator, ends[:] = None, []
    env.give_up_when(lambda: False)
    env.reset(1)
    assert not bool(env.step(torch.zeros(1, 1, 6)).done)
    env.close()


# ---- out of a hole, and out of reach


def test_a_joint_reset_begins_above_where_the_arm_was():
    clock = Clock()
    arm = Stoppable(home=ABOVE, clock=clock)
    env, world, cell = by_the_clock(clock, joint_reset_cycle=1)
    cell.arm = arm
    arm.restart(pose(0.5, 0, 0.055))
    cell.measure()
    cell.hold()
    world._episodes = 1
    env.reset(0)
    assert len(arm.resets) == 1 and arm.resets[0][2] > 0.14
    env.close()


def test_parking_lifts_first_and_a_stop_ends_it():
    for asked, said in ((False, "parked at the reset joints"), (True, "held; stopped on the way: person")):
        clock = Clock()
        arm = Stoppable(clock=clock)
        arm.restart(pose(0.5, 0, 0.055))
        cell = a_cell(arm, clock, at_end="joints")
        cell.asked_to_stop = lambda asked=asked: asked
        assert cell.close().startswith(said)
        assert [place[2] > 0.14 for place in arm.resets] == ([] if asked else [True])


def test_an_arm_outside_of_its_box_is_said_and_not_played_with():
    clock = Clock()
    arm = FakeArm(home=(0.3, 0, 0.2, *DOWN), clock=clock)
    cell = a_cell(arm, clock)
    with pytest.raises(ArmError, match=r"0\.100 m .* outside its limits.*joint_reset_cycle"):
        cell.go(pose(0.5, 0, 0.2), 1.0)
    cell.close()
    assert RealWorldConfig().override_cfg.joint_reset_cycle == 0


# ---- what fails


def test_the_arm_is_let_go_of_whatever_else_fails():
    class Broken:
        restarts = 0

        def start(self):
            """Works."""

        def newest(self, wait_s=0.0):
            return self

        def close(self):
            raise RuntimeError("broken")

    clock, closed = Clock(), []
    arm = FakeArm(clock=clock)
    cell = a_cell(arm, clock)
    cell.cameras = {"one": Broken(), "two": Broken()}
    arm.close = lambda: closed.append("arm")
    with pytest.raises(RuntimeError, match="broken"):
        cell.close()
    env, world, cell = by_the_clock(Clock())
    cell.arm.close = lambda: closed.append("again")
    world.operator = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        env.close()
    assert closed == ["arm", "again"]


def test_a_pose_that_is_none_is_never_sent():
    clock = Clock()
    arm = Stoppable(clock=clock)
    cell = a_cell(arm, clock)
    measured = arm.state
    arm.state = lambda: dataclasses.replace(measured(), pose=np.full(7, np.nan))
    cell.measure()
    cell.hold()
    assert cell.gate.stopped.startswith("state") and arm.stops == 1
    arm.fault = ""
    assert cell.close() == "left where it is; it measures no pose"
    assert all(np.isfinite(target).all() for target in arm.sent)


def test_a_link_that_is_lost_for_a_moment_costs_no_run():
    clock = Clock()
    arm = FakeArm(clock=clock)
    cell = a_cell(arm, clock)
    stiff = Compliance(translational_stiffness=1000.0)

    def come_back(due):
        clock.advance(due - clock.now)
        arm.unreachable = False

    cell._pace.wait_until = come_back
    arm.unreachable = True
    cell.set_compliance(stiff)
    assert arm.compliance == stiff
    arm.unreachable = True
    cell.gripper(0.0, 0.1)
    assert arm.state().gripper == 0.0
    arm.unreachable = True
    cell.joint_reset()
    cell._pace.wait_until = lambda due: clock.advance(due - clock.now)
    arm.unreachable = True
    with pytest.raises(ArmError, match="did not come back"):
        cell.set_compliance(stiff)
    cell.close()


def test_a_drawn_picture_is_new_however_busy_the_machine_is(monkeypatch):
    class Slow:
        on_demand = True

        def open(self):
            """Nothing."""

        def read(self):
            return np.zeros((4, 4, 3), np.uint8)

        close = open

    times = iter(np.arange(0.0, 1000.0, 10.0))  # between any two looks at the clock, ten seconds
    monkeypatch.setattr("rlinf.envs.realworld.cameras.camera.time.monotonic", lambda: float(next(times)))
    camera = Camera("wrist_1", Slow(), size=(4, 4), stale_s=0.1)
    camera.start()
    try:
        assert [camera.newest().number for _ in range(3)] == [1, 2, 3]
    except CameraError as error:
        pytest.fail(str(error))


def test_steps_shortened_by_the_speed_limit_are_counted():
    import torch

    env, _, cell = by_the_clock(Clock())
    env.reset(0)
    before = cell.gate.counts["speed"]
    step = env.step(torch.tensor([[[1.0, 0, 0, 0, 0, 0]]]))  # 2 cm; 8 mm a step at 0.08 m/s
    assert cell.gate.counts["speed"] == before + 1 and float(step.info["episode/gate_limited"]) == 1
    env.step(torch.tensor([[[0.3, 0, 0, 0, 0, 0]]]))
    assert cell.gate.counts["speed"] == before + 1
    env.close()
