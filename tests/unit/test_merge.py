"""The order-free rule, case by case."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logto_webhooks.records.merge import merge, merge_group, name_effect
from logto_webhooks.records.record import (
    ROLE,
    ROLES,
    ApiRead,
    Change,
    DeliveryChange,
    Group,
    Key,
    Record,
    RefetchRequest,
    Tombstone,
    Upsert,
    Value,
)

ANA = Key("user", "ana")


def group(*values: Value) -> Group:
    merged: Group | None = None
    for value in values:
        merged = merge_group(merged, value)
    assert merged
    return merged


def whole(content: Any, stamp: int, end: int | None = None) -> Value:
    return Value(content, stamp, stamp, stamp + 5 if end is None else end)


def part(content: Any, at: int) -> Value:
    return Value(content, at, at - 100, at)


def test_the_greatest_stamp_wins() -> None:
    """Whatever came last."""
    assert group(whole("new", 2000), whole("old", 1000)).content == "new"
    assert group(whole("old", 1000), whole("new", 2000)).content == "new"


def test_a_tie_has_one_winner_and_is_in_doubt() -> None:
    """Two writes with one stamp carry no order."""
    one, other = (
        group(whole("a", 1000), whole("b", 1000)),
        group(whole("b", 1000), whole("a", 1000)),
    )
    assert one == other
    assert one.doubtful


def test_a_value_told_again_is_no_rival() -> None:
    """However late."""
    assert not group(whole("a", 1000), whole("a", 1001), whole("a", 1002, end=9000)).doubtful


@pytest.mark.parametrize(("end", "doubtful"), [(1989, False), (1990, True), (2500, True)])
def test_doubt_begins_ten_milliseconds_before_the_start(end: int, doubtful: bool) -> None:
    """A rival that ended earlier is older for sure."""
    assert group(whole("new", 2000), whole("old", 1000, end)).doubtful is doubtful


@pytest.mark.parametrize(("at", "doubtful"), [(1889, False), (1890, True)])
def test_a_part_may_be_older_than_its_dispatch(at: int, doubtful: bool) -> None:
    """Its start is 100 ms before."""
    assert group(part("new", 2000), part("old", at)).doubtful is doubtful


def test_a_later_start_of_the_same_value_counts() -> None:
    """A whole and a part can carry the same value and stamp; without this the order shows."""
    values = [whole("new", 2000), part("new", 2000), whole("old", 1000, 1950)]
    merged = {repr(group(*order)) for order in itertools.permutations(values)}
    assert len(merged) == 1
    assert not group(*values).doubtful


contents = st.sampled_from(["a", "b", "c", {"n": 1}, None])
stamps = st.integers(1000, 1100)
values = st.one_of(
    st.builds(whole, contents, stamps, st.integers(1000, 1200)),
    st.builds(part, contents, st.integers(1000, 1300)),
)
changes: st.SearchStrategy[Change] = st.one_of(
    st.builds(
        Upsert,
        st.just(ANA),
        st.dictionaries(st.sampled_from(["own", "profile"]), values),
        st.dictionaries(st.sampled_from(["updatedAt", "lastSignInAt"]), stamps),
    ),
    st.builds(Tombstone, st.just(ANA), stamps),
    st.builds(RefetchRequest, st.just(ANA), st.sampled_from(["members", "dead delivery"]), stamps),
)


def known(some: list[Change]) -> Record:
    record = Record(ANA)
    for change in some:
        record = merge(record, change)
    return record


@given(some=st.lists(changes, max_size=8), data=st.data())
def test_a_record_follows_from_the_set_of_changes(some: list[Change], data: st.DataObject) -> None:
    """Any order, any duplicates."""
    order = data.draw(st.permutations(some))
    again = data.draw(st.lists(st.sampled_from(some))) if some else []
    assert known([*order, *again]) == known(some)


@given(some=st.lists(changes, max_size=6), change=changes)
def test_what_was_merged_is_merged(some: list[Change], change: Change) -> None:
    """A second time gives back the very same record."""
    record = known([*some, change])
    assert merge(record, change) is record


@given(some=st.lists(values, min_size=1, max_size=8))
def test_two_ends_are_enough_to_know_doubt(some: list[Value]) -> None:
    """Doubt is what it would be, were every value kept."""
    merged = group(*some)
    rivals = [value.end for value in some if value.content != merged.content]
    assert merged.doubtful == any(end >= merged.start - 10 for end in rivals)


def test_a_deletion_outlives_what_is_older() -> None:
    """An update that comes late revives nobody; a deletion ends every doubt and need."""
    late = Upsert(ANA, {"own": whole("late", 1900)})
    record = known(
        [Tombstone(ANA, 2000), late, RefetchRequest(ANA, "dead delivery", 1), Tombstone(ANA, 1500)]
    )
    assert record.deleted_at == 2000
    assert known([Tombstone(ANA, 0), Tombstone(ANA, 5)]) == known(
        [Tombstone(ANA, 5), Tombstone(ANA, 0)]
    )
    assert record.doubts == []
    assert record.waiting_for is None


def test_a_record_says_what_it_waits_for() -> None:
    """Doubt, what is missing, and what only Logto can tell."""
    assert Record(ANA).waiting_for == "incomplete"
    own = Upsert(ANA, {"own": whole("a", 1000)})
    assert known([own]).waiting_for is None
    rival = Upsert(ANA, {"own": whole("b", 1000)})
    asked = RefetchRequest(ANA, "members", 1)
    assert known([own, rival, asked]).waiting_for == "doubtful: own; members"
    assert known([own, RefetchRequest(ANA, "dead delivery", 1)]).doubts == ["dead delivery"]


@pytest.mark.parametrize(
    ("before", "change", "word"),
    [
        ([], Upsert(ANA, {"own": whole("a", 1000)}), "applied"),
        ([Upsert(ANA, {"own": whole("b", 2000)})], Upsert(ANA, {"own": whole("a", 1000)}), "stale"),
        (
            [Upsert(ANA, {"own": whole("a", 2000)})],
            Upsert(ANA, {"own": whole("a", 1000)}),
            "unchanged",
        ),
        ([Upsert(ANA, {"own": whole("a", 1)})], Upsert(ANA, {}, {"lastSignInAt": 1}), "applied"),
        ([Upsert(ANA, {"own": whole("a", 1)})], Upsert(ANA, {"profile": part({}, 500)}), "applied"),
        ([Tombstone(ANA, 1)], Upsert(ANA, {"own": whole("a", 1000)}), "tombstoned"),
        ([], Tombstone(ANA, 1), "applied"),
        ([Tombstone(ANA, 1)], Tombstone(ANA, 1), "tombstoned"),
        ([], RefetchRequest(ANA, "members", 1), "asks"),
    ],
)
def test_an_effect_has_a_word(before: list[Change], change: DeliveryChange, word: str) -> None:
    """For people, in one word."""
    record = known(before)
    assert name_effect(record, change, merge(record, change)) == word


changes = st.one_of(
    st.builds(Upsert, st.just(ANA), st.dictionaries(st.just("own"), values, max_size=1)),
    st.builds(
        lambda content, at, took: ApiRead(
            ANA, {"own": content}, at, at + took, settles=("members",)
        ),
        st.sampled_from("abc"),
        st.integers(0, 3000),
        st.integers(0, 200),
    ),
    st.builds(
        RefetchRequest, st.just(ANA), st.sampled_from(["members", "other"]), st.integers(0, 3000)
    ),
    # One role's list of users, and one user's list of roles.
    st.builds(
        lambda role, at, took: ApiRead(ANA, {f"{ROLE}{role}": role}, at, at + took),
        st.sampled_from("rs"),
        st.integers(0, 3000),
        st.integers(0, 200),
    ),
    st.builds(
        lambda roles, at, took: ApiRead(
            ANA,
            {ROLES: None, **{f"{ROLE}{each}": each for each in roles}},
            at,
            at + took,
            all_of=ROLE,
        ),
        st.sampled_from(["", "r", "s", "rs"]),
        st.integers(0, 3000),
        st.integers(0, 200),
    ),
)


@given(some=st.lists(changes, min_size=1, max_size=8), data=st.data())
def test_reads_need_no_order_either(some: list[Change], data: st.DataObject) -> None:
    """What is known follows from the set of deliveries and answers."""
    again = data.draw(st.permutations(some + some[: len(some) // 2]))
    assert known(some) == known(again)


class Lived(NamedTuple):
    """Writes to one user, in order: what, when it was made, when it was sent, whether in part."""

    writes: list[tuple[str, int, int, bool]]

    def at(self, moment: int) -> str:
        """What Logto answers then."""
        return [content for content, made, *_ in self.writes if made <= moment][-1]


@st.composite
def lives(draw: st.DrawFn) -> Lived:
    made, writes = 1000, []
    for content in draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6)):
        writes.append((content, made, made + draw(st.integers(0, 100)), draw(st.booleans())))
        made += draw(st.integers(1, 150))
    return Lived(writes)


@given(lived=lives(), data=st.data())
def test_a_read_neither_loses_to_what_is_older_nor_hides_what_is_newer(
    lived: Lived, data: st.DataObject
) -> None:
    """Whatever order writes, answers and deliveries come in: what isn't in doubt is true."""
    told: list[Change] = []
    for content, made, sent, in_part in lived.writes:
        value = Value(content, sent, sent - 100, sent) if in_part else whole(content, made, sent)
        told.append(Upsert(ANA, {"own": value}))
    last = lived.writes[-1][1]
    for moment in data.draw(st.lists(st.integers(1000, last + 200), max_size=3)):
        before, after = data.draw(st.integers(0, 80)), data.draw(st.integers(0, 80))
        told.append(ApiRead(ANA, {"own": lived.at(moment)}, moment - before, moment + after))
    record = known(data.draw(st.permutations(told)))
    assert record.doubts or record.groups["own"].content == lived.writes[-1][0]


@given(lived=lives(), data=st.data())
def test_a_read_after_all_settles_what_was_lost(lived: Lived, data: st.DataObject) -> None:
    """Whichever deliveries came: all of them had been sent when Logto was asked."""
    came = data.draw(st.lists(st.sampled_from(lived.writes), unique=True))
    told: list[Change] = [
        Upsert(ANA, {"own": whole(content, made, sent)}) for content, made, sent, _ in came
    ]
    end = max(sent for _, _, sent, _ in lived.writes)
    told.append(ApiRead(ANA, {"own": lived.at(end)}, end, end + 50))
    record = known(data.draw(st.permutations(told)))
    assert record.groups["own"].content == lived.writes[-1][0]
    assert record.waiting_for is None


def test_a_read_meets_needs_that_arose_before() -> None:
    """A later one is still there, and an older one that comes later isn't."""
    asked = ApiRead(ANA, {"own": "a"}, 1000, 1010, settles=("members",))
    assert known([RefetchRequest(ANA, "members", 1000), asked]).waiting_for is None
    assert known([asked, RefetchRequest(ANA, "members", 999)]).waiting_for is None
    assert known([asked, RefetchRequest(ANA, "members", 1001)]).waiting_for == "members"
    assert known([asked, RefetchRequest(ANA, "other", 1)]).waiting_for == "other"
