from math import sqrt

import pytest

from fedexperts.report.stats import interval, paired

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
    result = paired({0: 3.0, 1: 5.0, 2: 4.0, 7: 100.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: -100.0})  # 2, 3, 1
    assert result is not None
    assert (result.mean, result.n) == (2.0, 3)
    assert result.half == pytest.approx(T_2 / sqrt(3), rel=1e-6)


def test_what_a_seed_does_to_both_alike_is_taken_out_by_pairing():
    method, baseline = {0: 10.0, 1: 50.0, 2: 90.0}, {0: 9.0, 1: 49.0, 2: 89.0}
    result = paired(method, baseline)
    assert result is not None
    assert result.half == pytest.approx(0.0)
    assert (interval(list(method.values())).half or 0) > 90


def test_no_shared_seed_is_no_difference():
    assert paired({0: 1.0}, {1: 1.0}) is None
