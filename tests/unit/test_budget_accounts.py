"""What the budget remembers of keys: all that a living one has used, nothing of one that is gone."""

from tests.doubles.stages import stages

from gateway.store import accounts


async def test_a_deleted_keys_account_is_forgotten_once_its_last_call_has_ended(tmp_path):
    async with stages(tmp_path, DEFAULT_DAILY_TOKENS=10_000) as made:
        remembered = len(made.budget._keys)
        gone = []
        for _ in range(20):
            key, secret = await made.store.change(lambda db: accounts.create(db, {"name": "passing"}, "test"))
            call = made.call(secret=secret)
            await made.budget.hold(call)
            gone.append((key.id, call))
        for key_id, _ in gone:
            await made.store.change(lambda db, key_id=key_id: accounts.delete(db, key_id, "test"))
        made.budget.tick()
        assert len(made.budget._keys) == remembered + 20  # their calls still run, and are settled against them
        for key_id, call in gone:
            await made.end(call)
            assert made.budget.account(key_id).day(made.budget.days.today()).used == 30
        made.budget.tick()
        assert len(made.budget._keys) == remembered
        assert made.rows("SELECT SUM(prompt_tokens + completion_tokens) FROM daily_totals") == [(600,)]


async def test_a_disabled_keys_account_stays(tmp_path):
    async with stages(tmp_path, DEFAULT_DAILY_TOKENS=10_000) as made:
        call = made.call()
        key_id = call.caller.key_id
        await made.budget.hold(call)
        await made.end(call)
        await made.store.change(lambda db: accounts.set_disabled(db, key_id, True, "test"))
        made.budget.tick()
        await made.store.change(lambda db: accounts.set_disabled(db, key_id, False, "test"))
        assert made.budget.account(key_id).day(made.budget.days.today()).used == 30
