"""Whatever link and processors: what is settled is not much worse than the best there is."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.agent_core.test_encoding import Link, Speed

from holdfast_agent.core.encoding import MARGIN, Encoding

RATES = st.floats(5e6, 20e9)


@given(
    RATES,
    st.fixed_dictionaries(
        {
            Encoding.DELTA: st.builds(Speed, RATES, st.floats(0.01, 1.0)),
            Encoding.ZSTD: st.builds(Speed, RATES, st.floats(0.01, 1.0)),
            Encoding.DELTA_ZSTD: st.builds(Speed, RATES, st.floats(0.01, 1.0)),
        }
    ),
    st.integers(0, 10_000_000),
)
@settings(deadline=None, max_examples=60)
def test_what_is_settled_takes_at_most_a_margin_more_than_the_fastest(
    rate: float, speeds: dict[Encoding, Speed], latency_ns: int
) -> None:
    link = Link(rate, latency_ns=latency_ns, speeds={Encoding.NONE: Speed(20e9, 1.0)} | speeds)
    settled = link.run(max(200, 1500 * link.elapsed_ns(Encoding.NONE) / 1e9))
    fastest_ns = min(link.elapsed_ns(encoding) for encoding in Encoding)
    assert link.elapsed_ns(settled) * MARGIN <= fastest_ns * 1.001
