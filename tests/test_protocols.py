"""Protocols by name: their usual forms, what can be changed, what they are called."""

import pytest

from pspnet_jax.catalog import load_label_set
from pspnet_jax.protocols import PROTOCOLS, RULES, Protocol, choose, override

BUDGET_SECONDS = 10

ADE20K, CITYSCAPES = load_label_set("ade20k"), load_label_set("cityscapes")


def test_every_protocol_has_rules_and_a_paragraph():
    assert list(PROTOCOLS) == list(RULES)
    from pspnet_jax import protocols

    assert all(f"`{name}`" in protocols.__doc__ for name in PROTOCOLS)


def test_usual_forms():
    assert choose("whole", ADE20K) == Protocol("whole", flip=True, absent_class="skip")
    for name in ("semseg", "caffe"):
        assert choose(name, ADE20K) == Protocol(
            name,
            flip=True,
            absent_class="zero",
            scales=(1.0,),
            base_size=512,
            crop_size=(473, 473),
            stride=(316, 316),
        )
        cityscapes = choose(name, CITYSCAPES)
        assert (cityscapes.base_size, cityscapes.stride) == (2048, (476, 476))


def test_usual_forms_of_mmsegmentation_and_csail():
    """Their configs: ade20k.py, cityscapes.py, cityscapes_769x769.py; defaults.py."""
    whole = choose("mmseg-whole", ADE20K)
    assert (whole.base_size, whole.max_size, whole.flip) == (512, 2048, False)
    train_ids = load_label_set("cityscapes_train_ids")  # the same data set in its other encoding
    for name in PROTOCOLS:
        assert choose(name, train_ids) == choose(name, CITYSCAPES)
    whole = choose("mmseg-whole", CITYSCAPES)
    assert (whole.base_size, whole.max_size) == (1024, 2048)
    slide = choose("mmseg-slide", CITYSCAPES)
    assert (slide.base_size, slide.max_size) == (1025, 2049)
    assert (slide.crop_size, slide.stride) == ((769, 769), (513, 513))
    slide = choose("mmseg-slide", ADE20K)
    assert (slide.crop_size, slide.stride) == ((512, 512), (341, 341))
    csail = choose("csail", ADE20K)
    assert [round(450 * scale) for scale in csail.scales] == [300, 375, 450, 525, 600]


@pytest.mark.parametrize(
    ("name", "size", "scale", "expected"),
    [
        ("semseg", (512, 683), 1.0, (384, 512)),
        ("semseg", (683, 512), 0.75, (384, 288)),
        ("semseg", (300, 300), 1.75, (896, 896)),
        ("caffe", (512, 683), 1.0, (385, 513)),
        ("caffe", (683, 512), 0.5, (257, 193)),
        ("caffe", (513, 513), 1.0, (513, 513)),
        ("mmseg-whole", (512, 683), 1.0, (512, 683)),
        ("mmseg-whole", (300, 2000), 1.0, (307, 2048)),  # the long side decides
        ("mmseg-whole", (300, 400), 1.75, (896, 1195)),
        ("csail", (512, 683), 2 / 3, (304, 400)),
        ("csail", (683, 512), 4 / 3, (800, 600)),
        ("csail", (300, 900), 1.0, (336, 1000)),  # at most 1000
    ],
)
def test_sizes_at_a_scale(name, size, scale, expected):
    protocol = choose(name, ADE20K)
    assert protocol.rules.scaled(size, scale, protocol) == expected


def test_another_crop_has_another_stride_unless_it_is_given():
    usual = choose("semseg", ADE20K)
    assert override(usual, crop_size=(300, 90)).stride == (200, 60)
    assert override(usual, stride=(10, 20)).stride == (10, 20)
    assert override(override(usual, stride=(10, 20)), flip=False).stride == (10, 20)
    assert override(override(usual, stride=(10, 20)), crop_size=(90, 90)).stride == (60, 60)
    assert override(choose("mmseg-slide", ADE20K), crop_size=(512, 769)).stride == (341, 513)


def test_one_number_stands_for_both_sides_and_one_scale_for_all():
    usual = choose("semseg", ADE20K)
    assert override(usual, crop_size=90, stride=30, scales=2) == override(
        usual, crop_size=(90, 90), stride=(30, 30), scales=(2.0,)
    )


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "semseg"),
        ({"flip": False}, "semseg-noflip"),
        ({"scales": (0.5, 1.0, 1.75)}, "semseg-scales0.5,1,1.75"),
        ({"base_size": 300}, "semseg-base300"),
        ({"crop_size": (353, 473)}, "semseg-crop353x473"),
        ({"stride": (100, 200)}, "semseg-stride100x200"),
        ({"crop_size": (601, 601)}, "semseg-crop601x601"),
        ({"crop_size": (601, 601), "stride": (316, 316)}, "semseg-crop601x601-stride316x316"),
        ({"scales": (0.33333,)}, "semseg-scales0.33333"),
        ({"absent_class": "skip"}, "semseg-absentskip"),
    ],
)
def test_label_says_what_is_unusual(options, label):
    assert override(choose("semseg", ADE20K), **options).label(ADE20K) == label
    assert override(choose("whole", ADE20K), flip=False).label(ADE20K) == "whole-noflip"


def test_labels_of_the_other_protocols():
    for name in PROTOCOLS:
        assert choose(name, CITYSCAPES).label(CITYSCAPES) == name
    whole = override(choose("mmseg-whole", ADE20K), flip=True, max_size=1000)
    assert whole.label(ADE20K) == "mmseg-whole-flip-max1000"
    assert override(choose("csail", ADE20K), scales=1).label(ADE20K) == "csail-scales1"


def test_descriptions_hold_every_option():
    assert choose("semseg", ADE20K).describe() == (
        "semseg (scales 1; with mirror images; long side 512; windows 473x473; stride 316x316; "
        "padded on all sides; probabilities averaged; absent classes count as 0)"
    )
    assert choose("csail", ADE20K).describe() == (
        "csail (scales 0.6667, 0.8333, 1, 1.167, 1.333; no mirror images; short side 450; "
        "long side at most 1000; multiples of 8; resized as by Pillow; their probabilities averaged; "
        "absent classes count as 0)"
    )
    assert choose("whole", ADE20K).describe() == (
        "whole (with mirror images; their probabilities averaged; absent classes left out)"
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("whole", {"scales": (1.0,), "crop_size": (9, 9)}, "'whole' has no crop_size, scales"),
        ("csail", {"stride": (9, 9)}, r"have: stride \(semseg, caffe, mmseg-slide\)"),
        ("semseg", {"max_size": 9}, r"max_size \(mmseg-whole, mmseg-slide, csail\)"),
        ("mmseg-whole", {"max_size": 0}, "max_size=0 must be at least 1 pixel"),
        ("semseg", {"scales": (1.0, 0.0)}, "must be factors above 0"),
        ("semseg", {"scales": ()}, "must be factors above 0"),
        ("semseg", {"scales": (float("inf"),)}, "must be factors above 0, at most 100"),
        ("semseg", {"scales": (float("nan"),)}, "must be factors above 0, at most 100"),
        ("semseg", {"crop_size": (9, 9, 9)}, "must be .height, width."),
        ("semseg", {"stride": (0, 9)}, "must be .height, width."),
        ("semseg", {"base_size": 0}, "at least 1 pixel"),
        ("whole", {"absent_class": "one"}, "absent_class='one' must be skip or zero"),
        ("semseg", {"stride": (474, 9)}, "would leave pixels out"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        override(choose(name, ADE20K), **options)


def test_unknown_protocol():
    with pytest.raises(
        ValueError, match="protocol='hole' is not one of whole, semseg, caffe, mmseg"
    ):
        choose("hole", ADE20K)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_survive_json(name):
    protocol = override(choose(name, ADE20K), flip=True)
    assert Protocol.from_json(protocol.to_json()) == protocol


def test_protocols_of_older_checkpoints_are_read():
    stored = choose("semseg", ADE20K).to_json()
    del stored["max_size"]
    assert Protocol.from_json(stored) == choose("semseg", ADE20K)
