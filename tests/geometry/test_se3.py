"""Laws of rotations and rigid transforms, over batch shapes, dtypes and angles from 0 to pi."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from one4d_pl.geometry import se3

LEADS = [(), (2,), (2, 3)]
DTYPES = [torch.float32, torch.float64]
ANGLES = [0.0, 1e-9, 1e-6, 1e-4, 1e-2, 1.0, 3.0, math.pi - 1e-3, math.pi - 1e-6, math.pi]
ATOL = {torch.float32: 2e-6, torch.float64: 1e-14}  # some 30 roundings of numbers near one


def random_axis(lead: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*lead, 3, dtype=dtype, generator=generator), dim=-1)


def random_se3(lead: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(*lead, 3, dtype=dtype, generator=generator)
    return se3.se3_matrix(se3.so3_exp(vector), torch.randn(*lead, 3, dtype=dtype, generator=generator))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("angle", ANGLES)
def test_exp_log_and_quaternions_agree_with_scipy(angle, lead, dtype):
    vector = random_axis(lead, dtype) * angle
    rotation = se3.so3_exp(vector)
    oracle = Rotation.from_rotvec(vector.reshape(-1, 3).double().numpy())
    expected = torch.from_numpy(oracle.as_matrix()).reshape(*lead, 3, 3).to(dtype)
    torch.testing.assert_close(rotation, expected, rtol=0, atol=ATOL[dtype])
    quaternion = torch.from_numpy(oracle.as_quat()).reshape(*lead, 4).to(dtype)  # scipy's order is xyzw
    torch.testing.assert_close(se3.xyzw_to_matrix(quaternion), expected, rtol=0, atol=ATOL[dtype])
    same_sign = (se3.matrix_to_xyzw(rotation) * quaternion).sum(-1).abs()  # q and -q are one rotation
    torch.testing.assert_close(same_sign, torch.ones(lead, dtype=dtype), rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("angle", ANGLES)
def test_exp_undoes_log_and_the_angle_is_kept(angle, lead, dtype):
    rotation = se3.so3_exp(random_axis(lead, dtype, seed=1) * angle)
    vector = se3.so3_log(rotation)
    torch.testing.assert_close(se3.so3_exp(vector), rotation, rtol=0, atol=ATOL[dtype])
    expected = torch.full(lead, angle, dtype=dtype)
    torch.testing.assert_close(vector.norm(dim=-1), expected, rtol=0, atol=ATOL[dtype])
    identity = torch.eye(3, dtype=dtype)
    torch.testing.assert_close(se3.geodesic_angle(rotation, identity), expected, rtol=0, atol=ATOL[dtype])


def test_log_keeps_the_digits_of_a_tiny_rotation():
    vector = torch.tensor([1e-7, -2e-7, 3e-7])
    torch.testing.assert_close(se3.so3_log(se3.so3_exp(vector)), vector, rtol=1e-6, atol=0)


def test_geodesic_angle_is_relative_symmetric_and_exactly_zero_for_equal_rotations():
    first, second = se3.so3_exp(random_axis((5,), torch.float64, 2)), se3.so3_exp(random_axis((5,), torch.float64, 3))
    forward, backward = se3.geodesic_angle(first, second), se3.geodesic_angle(second, first)
    torch.testing.assert_close(forward, backward)
    trace = (first.mT @ second).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(forward, ((trace - 1) / 2).arccos())
    assert (se3.geodesic_angle(first.float(), first.float()) < 1e-6).all()


@pytest.mark.parametrize("angle", [0.0, 1e-8, 1.0])
def test_gradients_of_exp_and_log_are_right_down_to_zero(angle):
    vector = (random_axis((), torch.float64) * angle).requires_grad_()
    assert torch.autograd.gradcheck(se3.so3_exp, (vector,))
    # Through the round trip, so that the step of the check stays on the rotations.
    assert torch.autograd.gradcheck(lambda v: se3.so3_log(se3.so3_exp(v)), (vector,))


def test_quaternion_orders_are_what_their_names_say():
    quarter_turn_about_z = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    half = math.sqrt(0.5)
    xyzw, wxyz = torch.tensor([0.0, 0.0, half, half]), torch.tensor([half, 0.0, 0.0, half])
    torch.testing.assert_close(se3.xyzw_to_matrix(3 * xyzw), quarter_turn_about_z)
    torch.testing.assert_close(se3.wxyz_to_matrix(-wxyz), quarter_turn_about_z)
    torch.testing.assert_close(se3.matrix_to_xyzw(quarter_turn_about_z), xyzw)
    torch.testing.assert_close(se3.matrix_to_wxyz(quarter_turn_about_z), wxyz)
    order_matters = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert not torch.allclose(se3.xyzw_to_matrix(order_matters), se3.wxyz_to_matrix(order_matters))


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_quaternion_without_direction_is_refused(bad):
    with pytest.raises(ValueError, match="quaternion"):
        se3.xyzw_to_matrix(torch.full((2, 4), bad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", LEADS)
def test_inverse_composition_and_relative_transforms_agree_with_matrix_algebra(lead, dtype):
    first, second = random_se3(lead, dtype, 4), random_se3(lead, dtype, 5)
    atol = 5 * ATOL[dtype]
    torch.testing.assert_close(se3.invert_se3(first), torch.linalg.inv(first), rtol=0, atol=atol)
    torch.testing.assert_close(se3.relative_se3(first, second), torch.linalg.inv(first) @ second, rtol=0, atol=atol)
    identity = torch.eye(4, dtype=dtype).expand(*lead, 4, 4)
    torch.testing.assert_close(first @ se3.invert_se3(first), identity, rtol=0, atol=atol)
    assert (se3.invert_se3(first)[..., 3, :] == torch.tensor([0, 0, 0, 1], dtype=dtype)).all()


@pytest.mark.parametrize("lead", LEADS)
def test_rebasing_makes_camera_0_the_world_and_keeps_relative_motion(lead):
    cam2world = random_se3((*lead, 4), torch.float64, 6)
    rebased = se3.rebase_to_first(cam2world)
    identity = torch.eye(4, dtype=torch.float64).expand(*lead, 4, 4)
    torch.testing.assert_close(rebased[..., 0, :, :], identity)
    before = se3.relative_se3(cam2world[..., 1, :, :], cam2world[..., 3, :, :])
    after = se3.relative_se3(rebased[..., 1, :, :], rebased[..., 3, :, :])
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(se3.rebase_to_first(rebased), rebased)


def test_rebasing_loses_nothing_far_from_the_origin():
    near = random_se3((4,), torch.float32, 7)
    near[:, :3, 3] = (near[:, :3, 3] * 64).round() / 64  # so that adding 2^16 below is exact in float32
    far = near.clone()
    far[:, :3, 3] += torch.tensor([65536.0, -65536.0, 65536.0])
    torch.testing.assert_close(se3.rebase_to_first(far), se3.rebase_to_first(near), rtol=0, atol=0)


def test_bf16_autocast_does_not_touch_geometry():
    cam2world = random_se3((4,), torch.float32, 8)
    expected = se3.rebase_to_first(cam2world)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = se3.rebase_to_first(cam2world)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_is_rotation_tells_reflections_shears_scales_and_nan():
    rotation = se3.so3_exp(random_axis((4,), torch.float32, 9))
    assert se3.is_rotation(rotation).all()
    assert not se3.is_rotation(-rotation).any()  # orthonormal, left-handed
    assert not se3.is_rotation(rotation * 1.001).any()
    assert not se3.is_rotation(rotation + torch.tensor([0.0, 0.0, 0.01])).any()
    assert not se3.is_rotation(rotation * math.nan).any()
