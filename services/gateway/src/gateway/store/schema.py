"""Tables and migrations: numbered, forward only, run at every start, the same SQL for SQLite and PostgreSQL.

A migration that has left this repository is never changed; a new one is added below. `{serial}`, `{rowless}` and
`{blob}` are the only differences between the two databases.
"""

# ruff: noqa: SIM905 - a column list reads best as one line of words
# ruff: noqa: S608 - only names of our own schema are put into statements

from __future__ import annotations

from typing import Any

_ROTATED = "EXISTS (SELECT 1 FROM audit a WHERE a.subject = key_secrets.key_id AND a.action = 'key_rotated')"
_SEEDED = "key_id IN (SELECT id FROM keys WHERE origin = 'environment')"
WHO_MADE_AND_ENDED = (
    f"""UPDATE key_secrets SET made_by = 'environment' WHERE {_SEEDED} AND (not_after IS NOT NULL OR 'key_rotated' <>
        COALESCE((SELECT a.action FROM audit a WHERE a.subject = key_secrets.key_id AND a.action IN ('key_rotated',
            'key_created', 'secret_replaced', 'secret_restored') ORDER BY a.id DESC LIMIT 1), ''))""",
    f"""UPDATE key_secrets SET ended_by = CASE WHEN {_SEEDED} AND NOT {_ROTATED} THEN 'environment' ELSE 'operator' END
        WHERE not_after IS NOT NULL""",
)
"""What the audit tells of secrets from before that was kept with them. Where it is not sure, an operator did it: what
was rotated away does not come back."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value BIGINT NOT NULL)",
        "INSERT INTO meta (name, value) VALUES ('generation', 0)",
        """CREATE TABLE organisations (
            name TEXT PRIMARY KEY, daily_tokens BIGINT, created_at DOUBLE PRECISION NOT NULL)""",
        """CREATE TABLE keys (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, organisation TEXT, models TEXT, priority TEXT NOT NULL,
            weight BIGINT NOT NULL, expires_at DOUBLE PRECISION, disabled INTEGER NOT NULL, origin TEXT NOT NULL,
            created_at DOUBLE PRECISION NOT NULL, deleted_at DOUBLE PRECISION, generation BIGINT NOT NULL)""",
        "CREATE INDEX keys_generation ON keys (generation)",
        """CREATE TABLE limits (
            key_id TEXT PRIMARY KEY, requests_per_minute BIGINT, tokens_per_minute BIGINT, concurrency BIGINT,
            daily_tokens BIGINT, max_tokens BIGINT)""",
        """CREATE TABLE key_secrets (
            digest {blob} PRIMARY KEY, key_id TEXT NOT NULL, not_before DOUBLE PRECISION NOT NULL,
            not_after DOUBLE PRECISION)""",
        "CREATE INDEX key_secrets_key ON key_secrets (key_id)",
        """CREATE TABLE holds (
            request_id TEXT PRIMARY KEY, key_id TEXT NOT NULL, organisation TEXT, model TEXT NOT NULL,
            endpoint TEXT NOT NULL, tokens BIGINT NOT NULL, day TEXT NOT NULL, stream INTEGER NOT NULL,
            started_at DOUBLE PRECISION NOT NULL, expires_at DOUBLE PRECISION NOT NULL, trace_id TEXT,
            prompt_tokens BIGINT NOT NULL, completion_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL)
            {rowless}""",
        """CREATE TABLE usage_records (
            id {serial}, request_id TEXT NOT NULL UNIQUE, key_id TEXT NOT NULL, organisation TEXT,
            model TEXT NOT NULL, endpoint TEXT NOT NULL, prompt_tokens BIGINT NOT NULL,
            completion_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL, outcome TEXT NOT NULL, code TEXT,
            status INTEGER NOT NULL, stream INTEGER NOT NULL, started_at DOUBLE PRECISION NOT NULL,
            duration_seconds DOUBLE PRECISION NOT NULL, queue_seconds DOUBLE PRECISION NOT NULL,
            first_token_seconds DOUBLE PRECISION, trace_id TEXT, backend TEXT, day TEXT NOT NULL)""",
        """CREATE TABLE daily_totals (
            day TEXT NOT NULL, key_id TEXT NOT NULL, organisation TEXT NOT NULL, model TEXT NOT NULL,
            prompt_tokens BIGINT NOT NULL, completion_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL,
            requests BIGINT NOT NULL, refusals BIGINT NOT NULL,
            PRIMARY KEY (day, key_id, organisation, model)) {rowless}""",
        """CREATE TABLE daily_energy (
            day TEXT NOT NULL, key_id TEXT NOT NULL, joules DOUBLE PRECISION NOT NULL, PRIMARY KEY (day, key_id))""",
        """CREATE TABLE audit (
            id {serial}, at DOUBLE PRECISION NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL,
            details TEXT NOT NULL)""",
    ),
    (
        # A start touches only what the variable GATEWAY_API_KEYS made or ended: 'environment' or 'operator'.
        "ALTER TABLE key_secrets ADD COLUMN made_by TEXT NOT NULL DEFAULT 'operator'",
        "ALTER TABLE key_secrets ADD COLUMN ended_by TEXT",
        *WHO_MADE_AND_ENDED,
    ),
)

TABLES = (
    "meta",
    "organisations",
    "keys",
    "limits",
    "key_secrets",
    "holds",
    "daily_totals",
    "daily_energy",
    "audit",
    "usage_records",
)
"""Every table; the largest last, so that a check or a rescue has the keys and totals first."""

HOLD_COLUMNS = (
    "request_id key_id organisation model endpoint tokens day stream started_at expires_at trace_id "
    "prompt_tokens completion_tokens cached_tokens"
).split()

USAGE_COLUMNS = (
    "request_id key_id organisation model endpoint prompt_tokens completion_tokens cached_tokens outcome code status "
    "stream started_at duration_seconds queue_seconds first_token_seconds trace_id backend day"
).split()

TOTAL_COLUMNS = "day key_id organisation model prompt_tokens completion_tokens cached_tokens requests refusals".split()

ENDED_CALLS = (
    "CREATE TEMP VIEW IF NOT EXISTS ended_calls AS SELECT " + ", ".join(USAGE_COLUMNS) + " FROM usage_records",
    f"""CREATE TEMP TRIGGER IF NOT EXISTS end_call INSTEAD OF INSERT ON ended_calls BEGIN
        INSERT INTO usage_records ({", ".join(USAGE_COLUMNS)}) VALUES ({", ".join(f"new.{n}" for n in USAGE_COLUMNS)});
        INSERT INTO daily_totals ({", ".join(TOTAL_COLUMNS)})
            VALUES (new.day, new.key_id, coalesce(new.organisation, ''), new.model, new.prompt_tokens,
                new.completion_tokens, new.cached_tokens, new.outcome <> 'refused', new.outcome = 'refused')
            ON CONFLICT (day, key_id, organisation, model) DO UPDATE SET
                {", ".join(f"{name} = daily_totals.{name} + excluded.{name}" for name in TOTAL_COLUMNS[4:])};
        DELETE FROM holds WHERE request_id = new.request_id;
    END""",
)
"""What ends calls in one statement on SQLite: a row that is inserted into `ended_calls` becomes a record, is added to
the day's totals, and takes the call out of `holds`; a request id that is taken already fails, and nothing was done.
View and trigger belong to the connection that made them, so that nobody else who writes into the tables meets them."""

_SQLITE = {"serial": "INTEGER PRIMARY KEY AUTOINCREMENT", "rowless": "WITHOUT ROWID", "blob": "BLOB"}
_POSTGRESQL = {"serial": "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY", "rowless": "", "blob": "BYTEA"}


def migrate(database: Any) -> int:
    """Bring `database` (a `connection.Database`) to the newest form; returns the number of migrations that ran.

    Safe when several processes start at once: the first one in holds the write lock until all of them have run.
    """
    words = _SQLITE if database.sqlite else _POSTGRESQL
    ran = 0
    with database.transaction():
        if not database.sqlite:
            database.run("SELECT pg_advisory_xact_lock(?)", (database.MIGRATION_LOCK,))
        database.run("CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY)")
        done = {number for (number,) in database.run("SELECT number FROM migrations")}
        for number, statements in enumerate(MIGRATIONS, start=1):
            if number in done:
                continue
            for statement in statements:
                database.run(statement.format(**words))
            database.run("INSERT INTO migrations (number) VALUES (?)", (number,))
            ran += 1
        newer = done - set(range(1, len(MIGRATIONS) + 1))
    if newer:
        raise database.Newer(f"the database was written by a newer gateway (migration {max(newer)})")
    return ran
