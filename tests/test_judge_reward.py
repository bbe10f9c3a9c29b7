"""A judge as the reward: its event loop, which is closed with it."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

from cai.config import JudgeConfig
from cai.constitution import load_constitution


def test_its_loop_is_closed_with_it_also_while_another_loop_runs(tmp_path):
    from cai.training.online.rewards import JudgeReward, Reward

    file = tmp_path / "c.yaml"
    file.write_text("name: c\ndescription: d\nlicense: MIT\nprinciples:\n  - {id: short, check: {max_words: 3}}\n")

    def rewarded() -> Any:
        reward = Reward("short", JudgeReward(load_constitution(str(file)), JudgeConfig(method="checks")))
        assert reward([[{"role": "user", "content": "Hi"}]], [[{"role": "assistant", "content": "Yes."}]]) == [1.0]
        return reward

    async def let_go(held: list[Any]) -> None:
        held.clear()
        gc.collect()
        for thread in set(threading.enumerate()) - before:
            thread.join()

    held, before = [rewarded(), rewarded()], set(threading.enumerate())
    first, second = (one._runner.get_loop() for one in held)
    asyncio.run(let_go(held))
    assert first.is_closed()
    assert second.is_closed()
    held.append(rewarded())
    last = held[0]._runner.get_loop()
    held.clear()
    gc.collect()
    assert last.is_closed()
