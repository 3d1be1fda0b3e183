"""Seeds: their values are part of every run that was ever made, and each place has its own."""

import itertools

from data_pipeline import seeds


def test_values_are_those_of_earlier_runs() -> None:
    sample = seeds.sample_seed(3, 1, 2, 45)
    assert sample == "3/1/2/45"
    assert (seeds.view_seed(sample), seeds.mask_seed(sample)) == ("3/1/2/45/view", "3/1/2/45/mask")
    stream = seeds.stream_seed(3, 100)
    assert (seeds.stream_epoch_seed(stream, 2), seeds.stream_sample_seed(stream, 7, 1)) == ("3/100/2", "3/100/7/1")
    assert (seeds.shards_key(1, 2), seeds.group_key(1, 2, 3, 4), seeds.model_seed(5)) == ((1, 2), (1, 2, 3, 4), 5)
    assert (seeds.micro_batch_seed(0, 0, 0), seeds.micro_batch_seed(7, 123, 4)) == (
        759540517790923586,
        4656071428192550536,
    )


def test_places_differ() -> None:
    places = list(itertools.product(range(3), repeat=4))
    assert len({seeds.sample_seed(*place) for place in places}) == len(places)
    assert len({seeds.micro_batch_seed(*place[:3]) for place in places}) == len(places) // 3
