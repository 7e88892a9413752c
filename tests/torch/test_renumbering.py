"""Renumbering: one tensor after the other becomes what permute_state_dict makes of all of them."""

import json

import pytest
from moe_models import build_kind, kinds, placement_for, same, tensors_of
from test_architectures import REFUSED, RIGHT, quiet, tried  # noqa: F401

from moetuner.torch import Renumbering, moe_layers, permute_state_dict

pytestmark = pytest.mark.filterwarnings("ignore")


def one_by_one(renumber, tensors):
    """Renumber tensors in an order of their own, each alone."""
    names = sorted(tensors, key=lambda name: name[::-1])
    return dict(renumber(name, tensors[name]) for name in names)


@pytest.mark.parametrize("kind", kinds())
def test_every_architecture(kind, tmp_path):
    """Of a checkpoint and of a model in memory the same by bits, there and back, or refused."""
    why = None
    try:
        model = build_kind(kind)
        moe_layers(model)
        model.save_pretrained(tmp_path / "old")
    except Exception as error:
        why = f"cannot be tried: {type(error).__name__}: {error}".splitlines()[0]
    if why is not None:
        assert kind not in RIGHT, why
        pytest.skip(why)
    placement = placement_for(model)
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    old, state = tensors_of(tmp_path / "old"), dict(model.state_dict())
    _, why = tried(permute_state_dict, tmp_path / "old", placement, tmp_path / "new")
    if why is not None:
        assert kind not in RIGHT, why
        with pytest.raises(REFUSED):
            one_by_one(Renumbering(placement, config), old)
        pytest.skip(why)
    new = tensors_of(tmp_path / "new")
    for about in (config, model.config):
        renumber = Renumbering(placement, about)
        assert same(one_by_one(renumber, old), new)
        expected = permute_state_dict(state, placement, config=config)
        assert same(one_by_one(renumber, state), expected)
    assert same(one_by_one(Renumbering(placement, config, names=old), old), new)
    assert same(one_by_one(Renumbering(placement, config, inverse=True), new), old)
