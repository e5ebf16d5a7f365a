"""Times of a column share one format; what could be read two ways, or is of another kind, is refused by its line."""

from decimal import Decimal

import pytest

from edgesched.data.reading import Records
from edgesched.data.timestamps import read_times
from edgesched.errors import ArgumentError, RequestError


def since_first(values, time_format=None):
    records = Records("t.csv", {"t": list(values)}, [f"line {i + 2}" for i in range(len(values))], RequestError)
    found = read_times(records, "t", time_format).seconds
    first = next(value for value in found if value is not None)
    return [None if value is None else value - first for value in found]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["10", "12.5", " 19 ", "1e2"], ["0", "2.5", "9", "90"]),
        (["1700000000.25", "1700000001"], ["0", "0.75"]),
        (["2024-11-15 10:00:00", "2024-11-15T10:00:01.5", "2024-11-16 10:00"], ["0", "1.5", "86400"]),
        (["2023-11-16 18:17:03.9799600", "2023-11-16 18:17:04.0319600"], ["0", "0.052"]),
        (["2024-11-15T10:00:00Z", "2024-11-15T12:00:30+02:00", "2024-11-15T04:30:00-0530"], ["0", "30", "0"]),
        (["2024/11/15 10:00:00", "2024/11/15 10:01:00"], ["0", "60"]),
        (["2024-02-28", "2024-03-01"], ["0", "172800"]),
        (["01.02.2024 10:00", "13.02.2024 10:00"], ["0", "1036800"]),
        (["02/01/2024 10:00", "02/13/2024 10:00"], ["0", "1036800"]),
        (["01/02/2024 11:59:00 AM", "01/02/2024 12:01:00 PM"], ["0", "120"]),
        (["2024-11-15 10:00:00", "", "None", "2024-11-15 10:00:07"], ["0", None, None, "7"]),
    ],
)
def test_times_by_hand(values, expected):
    assert since_first(values) == [None if value is None else Decimal(value) for value in expected]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["2024-11-15 10:00:00", "2024-11-15 10:00:01", "0"], "line 4: t is '0', of another kind than '2024-11-15 10"),
        (["1", "2", "2024-11-15 10:00:00"], "line 4: t is '2024-11-15 10:00:00' in a column of numbers"),
        (["1700000000", "1700000005", "0"], "line 4: t is '0', more than ten years from the other times"),
        (["2024-01-01 00:00", "2024-01-01 00:01", "1970-01-01 00:00"], "line 4: .*more than ten years"),
        (["2024-11-15 10:00:00", "2024-11-15 10:00:01", "2024-11-15 10:00:02Z"], "line 4: .*of another kind"),
        (["2024-11-15 10:00:00", "2024-11-15 10:00:01", "15/11/2024 10:00:02"], "line 4: .*of another kind"),
        (["01/02/2024 10:00", "02/02/2024 10:00"], "line 2: .*say time_format=day_first or time_format=month_first"),
        (["13/01/2024 10:00", "01/14/2024 10:00"], "line 3: .*another order than line 2"),
        (["2024-02-30 10:00:00"], "line 2: t is '2024-02-30 10:00:00', which is no date and time"),
        (["1,5", "2,5"], "line 2: t is '1,5'; write it with a decimal point"),
        (["1.5", "2,5", "3.5"], "line 3: t is '2,5'; write it with a decimal point"),
        (["2024-11-15 10:00:00,250"], "line 2: .*decimal point, not a comma"),
        (["1", "nan"], "line 3: t is 'nan'; expected a finite number"),
        (["1", "inf", "2"], "line 3: t is 'inf'; expected a finite number"),
        (["1", "1e999", "2"], "line 3: t is '1e999'; expected a finite number"),
        (["1700000000000", "1700000001000"], "line 2: .*too large for seconds; say time_format=ms"),
        (["20241115", "20241116"], "line 2: t is 20241115, seconds or a day; say time_format=s or"),
        (["15 Nov 2024 10:00", "16 Nov 2024 10:00"], "line 2: .*in no format known here.*time_format"),
    ],
)
def test_another_kind_and_what_can_be_read_two_ways_are_refused(values, message):
    with pytest.raises(RequestError, match=message) as caught:
        since_first(values)
    assert "\n" not in str(caught.value)


def test_a_format_that_is_named_is_applied_to_every_row():
    assert since_first(["01/02/2024", "02/02/2024"], "day_first") == [0, 86_400]
    assert since_first(["01/02/2024", "02/02/2024"], "month_first") == [0, 31 * 86_400]  # 2 January, 2 February
    assert since_first(["1700000000000", "1700000000250"], "ms") == [0, Decimal("0.25")]
    assert since_first(["15 Nov 2024 10:00", "15 Nov 2024 10:01"], "%d %b %Y %H:%M") == [0, 60]
    with pytest.raises(RequestError, match="line 3: .*expected the format %d.%m.%Y"):
        since_first(["15.11.2024", "2024-11-16"], "%d.%m.%Y")
    with pytest.raises(RequestError, match="with the year first"):
        since_first(["2024-11-15"], "day_first")
    with pytest.raises(RequestError, match="expected dates"):
        since_first(["5"], "day_first")
    with pytest.raises(ArgumentError, match="time_format: expected s, ms, us, ns"):
        since_first(["1"], "minutes")
