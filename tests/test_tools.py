"""The programs that make the embedded model are seeded: the same number is the same scene."""

import numpy as np

from tools.demo_model.scenes import scene


def test_a_scene_is_made_again_from_its_number():
    first, caption = scene(7, (128, 192))
    again, same_caption = scene(7, (128, 192))
    other, _ = scene(8, (128, 192))
    assert first.shape == (128, 192, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and caption == same_caption
    assert not np.array_equal(first, other) and 3 < len(caption) < 200
