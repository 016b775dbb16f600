from math import exp, log, sqrt

import numpy as np
import pytest
from scipy import stats as reference

from fedexperts.report.stats import (
    Difference,
    Paired,
    bootstrap,
    holm,
    interval,
    over_clients,
    over_seeds,
    over_seeds_and_examples,
    ratio,
)

T_2 = 4.302653  # the 0.975 quantile of Student t with 2 degrees of freedom, as tables print it
T_1 = 12.706205


def test_the_interval_of_1_2_3_is_2_plus_minus_t_over_root_3():
    result = interval([1.0, 2.0, 3.0])  # s = 1
    assert (result.mean, result.n) == (2.0, 3)
    assert result.half == pytest.approx(T_2 / sqrt(3), rel=1e-6)


def test_two_values_are_enough_for_an_interval():
    assert interval([4.0, 6.0]).half == pytest.approx(T_1 * sqrt(2) / sqrt(2), rel=1e-6)  # s = √2, n = 2


def test_one_value_has_no_interval():
    assert interval([0.8]).half is None


def test_a_paired_difference_looks_only_at_seeds_both_have():
    result = over_seeds({0: 3.0, 1: 5.0, 2: 4.0, 7: 100.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: -100.0})  # 2, 3, 1
    assert result is not None
    assert (result.interval.mean, result.interval.n) == (2.0, 3)
    assert result.interval.half == pytest.approx(T_2 / sqrt(3), rel=1e-6)


def test_what_a_seed_does_to_both_alike_is_taken_out_by_pairing():
    method, baseline = {0: 10.0, 1: 50.0, 2: 90.0}, {0: 9.0, 1: 49.0, 2: 89.0}
    result = over_seeds(method, baseline)
    assert result is not None
    assert result.interval.half == pytest.approx(0.0)
    assert (interval(list(method.values())).half or 0) > 90


def test_no_shared_seed_is_no_difference():
    assert over_seeds({0: 1.0}, {1: 1.0}) is None


def test_the_p_value_of_a_paired_difference_is_that_of_scipys_paired_t_test():
    method, baseline = [3.0, 5.0, 4.0, 7.0], [1.0, 2.0, 3.0, 3.5]
    result = over_seeds(dict(enumerate(method)), dict(enumerate(baseline)))
    assert result is not None
    assert result.p == pytest.approx(reference.ttest_rel(method, baseline).pvalue, rel=1e-9)


def test_without_a_spread_nothing_is_tested_and_nothing_could_have_been_seen():
    for same in (Difference(2.0, 0.0, 1, 2), Difference(2.0, None, 0, 1)):
        assert same.p is None and same.detectable is None


def test_a_true_difference_of_the_detectable_size_is_found_in_80_of_100_repetitions():
    detectable = Difference(0.0, 1.0, 4, 5).detectable  # error 1, so differences in seeds spread by √5
    assert detectable is not None
    rng = np.random.default_rng(0)
    samples = rng.normal(detectable, sqrt(5), size=(20_000, 5))
    found = np.abs(samples.mean(1)) / (samples.std(1, ddof=1) / sqrt(5)) > reference.t.ppf(0.975, 4)
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_examples_that_all_seeds_share_count_once():
    """Both seeds differ alike on four examples, by 0, 1, 2 and 3: s² is 5/3, of the mean 5/12, and no seed adds to it."""
    same = [Paired(seed, "sort", example, float(example)) for seed in (0, 1) for example in range(4)]
    result = over_seeds_and_examples(same)
    assert result is not None
    assert result.mean == 1.5
    assert result.error == pytest.approx(sqrt(5 / 12), rel=0.06)  # of a bootstrap
    assert result.freedom == pytest.approx(3)  # four examples


def test_seeds_with_examples_of_their_own_differ_by_seed_alone():
    rng = np.random.default_rng(1)
    own = [Paired(seed, "sort", (seed, number), float(rng.normal())) for seed in range(3) for number in range(200)]
    means = {seed: float(np.mean([each.difference for each in own if each.seed == seed])) for seed in range(3)}
    alone, both = over_seeds(means, dict.fromkeys(means, 0.0)), over_seeds_and_examples(own)
    assert alone is not None and both is not None
    assert both.mean == pytest.approx(alone.mean)
    assert alone.error is not None and both.error is not None
    assert alone.error <= both.error < 1.2 * alone.error


def test_the_bootstrap_has_the_variance_of_a_mean_and_weighs_clients_by_their_examples():
    ten = [Paired(0, "sort", number, float(number)) for number in range(10)]
    assert np.var(bootstrap(ten)) == pytest.approx(82.5 / 9 / 10, rel=0.1)  # s² / n of 0 … 9
    clients = [Paired(0, "sort", "a", 1.0, 30), Paired(0, "sort", "b", 5.0, 10)]
    result = over_clients(clients)
    assert result is not None
    assert (result.mean, result.freedom, result.over) == (2.0, 1, "clients")  # (30 · 1 + 10 · 5) / 40
    assert result.error == pytest.approx(2.0, rel=0.05)  # one of the two is drawn: 1 or 5, each as often


def test_a_task_with_a_single_client_or_example_has_no_error_over_them():
    assert over_clients([Paired(0, "sort", "a", 1.0)]) is None
    assert over_clients([]) is None and over_seeds_and_examples([]) is None
    assert over_seeds_and_examples([Paired(seed, "sort", 0, 1.0) for seed in (0, 1)]) is None


def test_intervals_cover_the_true_difference_at_about_their_rate():
    """Seeds, examples that they share, and both together have effects; 95 of 100 intervals should hold the true difference."""
    rng, covered = np.random.default_rng(2), {"both": 0, "seeds": 0}
    repetitions, seeds, examples, true = 300, 4, 30, 2.0
    for _ in range(repetitions):
        effects = rng.normal(0, 0.5, seeds)[:, None] + rng.normal(0, 4, examples) + rng.normal(0, 4, (seeds, examples)) + true
        rows = [Paired(seed, "sort", unit, float(effects[seed, unit])) for seed in range(seeds) for unit in range(examples)]
        alone = over_seeds(dict(enumerate(effects.mean(1))), dict.fromkeys(range(seeds), 0.0))
        for name, result in (("both", over_seeds_and_examples(rows)), ("seeds", alone)):
            assert result is not None and result.interval.half is not None
            covered[name] += abs(result.mean - true) <= result.interval.half
    assert 0.92 <= covered["both"] / repetitions <= 0.985
    assert covered["seeds"] / repetitions < 0.9  # which is why examples are drawn


def test_holm_multiplies_the_smallest_of_four_by_four_and_keeps_their_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # 0.04 · 1 is below 0.03 · 2
    assert holm([0.9, None, 0.6]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_a_ratio_is_the_geometric_mean_with_the_interval_of_the_logarithms():
    result = ratio([(2.0, 1.0), (8.0, 1.0)])  # logarithms log 2 and 3 log 2
    assert result is not None
    assert result.mean == pytest.approx(4.0) and result.n == 2
    assert (result.low, result.high) == pytest.approx((exp(2 * log(2) - T_1 * log(2)), exp(2 * log(2) + T_1 * log(2))), rel=1e-5)
    single = ratio([(3.0, 2.0)])
    assert single is not None and (single.mean, single.low, single.high) == (1.5, None, None)
    assert ratio([]) is None
