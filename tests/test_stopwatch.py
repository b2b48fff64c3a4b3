from lt4rec_sparse.stopwatch import interleaved


def test_calls_take_turns_and_slower_is_slower():
    order = []

    def work(name, size):
        order.append(name)
        return sum(range(size))

    timings = interleaved(
        {"short": lambda: work("short", 10), "long": lambda: work("long", 100_000)}, rounds=5, round_us=1.0
    )
    assert timings["short"].median_us < timings["long"].median_us
    assert timings["long"].p20_us <= timings["long"].median_us <= timings["long"].p80_us
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns[-4:] == ["short", "long", "short", "long"]
