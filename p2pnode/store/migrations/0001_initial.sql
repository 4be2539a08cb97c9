-- Numbers of money are integer micro-credits; names ending in _ms are Unix times in milliseconds; ids have 32 bytes.

CREATE TABLE remembered (
    key TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT;

-- Signed documents, exactly as received or sent.
CREATE TABLE documents (
    sequence INTEGER PRIMARY KEY,
    id BLOB NOT NULL UNIQUE CHECK (length(id) = 32),
    kind INTEGER NOT NULL,
    signer BLOB NOT NULL CHECK (length(signer) = 32),
    agreement BLOB CHECK (agreement IS NULL OR length(agreement) = 32),
    stored_ms INTEGER NOT NULL,
    envelope BLOB NOT NULL
) STRICT;
CREATE INDEX documents_by_kind ON documents (kind, sequence);
CREATE INDEX documents_by_agreement ON documents (agreement, sequence) WHERE agreement IS NOT NULL;

-- What this node itself has signed, each entry holding the hash of the one before.
CREATE TABLE audit_log (
    sequence INTEGER PRIMARY KEY CHECK (sequence >= 1),
    document BLOB NOT NULL UNIQUE CHECK (length(document) = 32),
    kind INTEGER NOT NULL,
    logged_ms INTEGER NOT NULL,
    previous BLOB NOT NULL CHECK (length(previous) = 32),
    hash BLOB NOT NULL CHECK (length(hash) = 32)
) STRICT;
CREATE TRIGGER audit_log_keeps BEFORE UPDATE ON audit_log
BEGIN SELECT RAISE(ABORT, 'ledger: the audit log only grows'); END;
CREATE TRIGGER audit_log_stays BEFORE DELETE ON audit_log
BEGIN SELECT RAISE(ABORT, 'ledger: the audit log only grows'); END;
CREATE TRIGGER audit_log_links BEFORE INSERT ON audit_log
WHEN NEW.sequence <> coalesce((SELECT max(sequence) FROM audit_log), 0) + 1
    OR (NEW.sequence > 1 AND NEW.previous IS NOT (SELECT hash FROM audit_log WHERE sequence = NEW.sequence - 1))
BEGIN SELECT RAISE(ABORT, 'ledger: the audit log has a gap'); END;

CREATE TABLE agreements (
    id BLOB PRIMARY KEY CHECK (length(id) = 32),
    role TEXT NOT NULL CHECK (role IN ('provider', 'client')),
    peer BLOB NOT NULL CHECK (length(peer) = 32),
    model_id BLOB NOT NULL CHECK (length(model_id) = 32),
    quote BLOB NOT NULL CHECK (length(quote) = 32),
    job BLOB CHECK (job IS NULL OR length(job) = 32),
    state TEXT NOT NULL CHECK (state IN ('ordered', 'open', 'closing', 'ended')),
    amount_max INTEGER NOT NULL CHECK (amount_max >= 0),
    slice_amount INTEGER NOT NULL CHECK (slice_amount >= 0),
    chain_anchor BLOB NOT NULL CHECK (length(chain_anchor) = 32),
    chain_length INTEGER NOT NULL CHECK (chain_length >= 1),
    chain_seed BLOB,
    opened_ms INTEGER NOT NULL,
    deadline_ms INTEGER NOT NULL,
    total INTEGER NOT NULL DEFAULT 0 CHECK (total >= 0),
    paid INTEGER NOT NULL DEFAULT 0 CHECK (paid >= 0 AND paid <= total),
    slices INTEGER NOT NULL DEFAULT 0,
    slices_paid INTEGER NOT NULL DEFAULT 0 CHECK (slices_paid <= slices AND slices_paid <= chain_length),
    chain_tip BLOB NOT NULL CHECK (length(chain_tip) = 32),
    next_call INTEGER NOT NULL DEFAULT 0,
    ended_ms INTEGER NOT NULL DEFAULT 0,
    end_reason TEXT NOT NULL DEFAULT '' CHECK ((end_reason <> '') = (state = 'ended'))
) STRICT;
CREATE INDEX agreements_by_state ON agreements (state, role);
CREATE INDEX agreements_by_peer ON agreements (peer);
CREATE INDEX agreements_by_job ON agreements (job) WHERE job IS NOT NULL;

CREATE TABLE calls (
    agreement BLOB NOT NULL REFERENCES agreements (id),
    number INTEGER NOT NULL,
    slice INTEGER NOT NULL,
    position INTEGER NOT NULL,
    input_hash BLOB NOT NULL CHECK (length(input_hash) = 32),
    output_hash BLOB NOT NULL,
    probe_hash BLOB NOT NULL,
    amount INTEGER NOT NULL CHECK (amount >= 0),
    state TEXT NOT NULL CHECK (state IN ('sent', 'answered', 'receipted', 'void')),
    PRIMARY KEY (agreement, number)
) STRICT, WITHOUT ROWID;
CREATE INDEX calls_by_slice ON calls (agreement, slice, position);

CREATE TABLE receipts (
    agreement BLOB NOT NULL REFERENCES agreements (id),
    slice INTEGER NOT NULL,
    document BLOB NOT NULL UNIQUE CHECK (length(document) = 32),
    calls INTEGER NOT NULL,
    root BLOB NOT NULL CHECK (length(root) = 32),
    operations INTEGER NOT NULL,
    amount INTEGER NOT NULL CHECK (amount >= 0),
    total INTEGER NOT NULL CHECK (total >= amount),
    engine TEXT NOT NULL,
    ended_ms INTEGER NOT NULL,
    PRIMARY KEY (agreement, slice)
) STRICT, WITHOUT ROWID;

CREATE TABLE cheques (
    agreement BLOB NOT NULL,
    slice INTEGER NOT NULL,
    document BLOB NOT NULL UNIQUE CHECK (length(document) = 32),
    receipt BLOB NOT NULL CHECK (length(receipt) = 32),
    total INTEGER NOT NULL CHECK (total >= 0),
    preimage BLOB NOT NULL CHECK (length(preimage) = 32),
    issued_ms INTEGER NOT NULL,
    PRIMARY KEY (agreement, slice),
    FOREIGN KEY (agreement, slice) REFERENCES receipts (agreement, slice)
) STRICT, WITHOUT ROWID;

-- Double entry. A journal carries its entries as JSON [[account, amount], ...]; one trigger refuses it unless they sum to
-- zero, and unfolds them. So no statement exists that leaves the books unbalanced, even for a moment.
CREATE TABLE journals (
    id INTEGER PRIMARY KEY,
    source BLOB NOT NULL UNIQUE CHECK (length(source) = 32),
    kind TEXT NOT NULL,
    agreement BLOB CHECK (agreement IS NULL OR length(agreement) = 32),
    posted_ms INTEGER NOT NULL,
    note TEXT NOT NULL,
    entries TEXT NOT NULL CHECK (json_valid(entries) AND json_array_length(entries) >= 2)
) STRICT;
CREATE INDEX journals_by_time ON journals (posted_ms);

CREATE TABLE entries (
    journal INTEGER NOT NULL REFERENCES journals (id),
    position INTEGER NOT NULL,
    account TEXT NOT NULL CHECK (account <> ''),
    amount INTEGER NOT NULL CHECK (amount <> 0),
    PRIMARY KEY (journal, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX entries_by_account ON entries (account, journal);

CREATE TABLE balances (
    account TEXT PRIMARY KEY,
    amount INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TRIGGER journals_balance BEFORE INSERT ON journals
WHEN (SELECT sum(json_extract(value, '$[1]')) FROM json_each(NEW.entries)) IS NOT 0
BEGIN SELECT RAISE(ABORT, 'ledger: the entries do not sum to zero'); END;
CREATE TRIGGER journals_unfold AFTER INSERT ON journals
BEGIN
    INSERT INTO entries (journal, position, account, amount)
    SELECT NEW.id, key, json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(NEW.entries);
END;
CREATE TRIGGER entries_belong BEFORE INSERT ON entries
WHEN NOT EXISTS (
    SELECT 1 FROM journals, json_each(journals.entries)
    WHERE journals.id = NEW.journal AND key = NEW.position AND json_extract(value, '$[0]') = NEW.account AND json_extract(value, '$[1]') = NEW.amount
)
BEGIN SELECT RAISE(ABORT, 'ledger: an entry that no journal holds'); END;
CREATE TRIGGER entries_count AFTER INSERT ON entries
BEGIN
    INSERT INTO balances (account, amount) VALUES (NEW.account, NEW.amount)
    ON CONFLICT (account) DO UPDATE SET amount = amount + excluded.amount;
END;
CREATE TRIGGER journals_keep BEFORE UPDATE ON journals BEGIN SELECT RAISE(ABORT, 'ledger: a journal is never changed'); END;
CREATE TRIGGER journals_stay BEFORE DELETE ON journals BEGIN SELECT RAISE(ABORT, 'ledger: a journal is never removed'); END;
CREATE TRIGGER entries_keep BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'ledger: an entry is never changed'); END;
CREATE TRIGGER entries_stay BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'ledger: an entry is never removed'); END;

CREATE TABLE jobs (
    id BLOB PRIMARY KEY CHECK (length(id) = 32),
    kind TEXT NOT NULL CHECK (kind IN ('run', 'map', 'session')),
    name TEXT NOT NULL,
    model_id BLOB NOT NULL CHECK (length(model_id) = 32),
    spec BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'stopping', 'ended')),
    budget_max INTEGER NOT NULL CHECK (budget_max >= 0),
    created_ms INTEGER NOT NULL,
    deadline_ms INTEGER NOT NULL DEFAULT 0,
    items INTEGER NOT NULL DEFAULT 0,
    spent INTEGER NOT NULL DEFAULT 0 CHECK (spent >= 0),
    reserved INTEGER NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    waits_for TEXT NOT NULL DEFAULT '',
    ended_ms INTEGER NOT NULL DEFAULT 0,
    end_reason TEXT NOT NULL DEFAULT '',
    end_detail TEXT NOT NULL DEFAULT '',
    CHECK ((end_reason <> '') = (state = 'ended')),
    CHECK (spent + reserved <= budget_max)
) STRICT;
CREATE INDEX jobs_by_time ON jobs (created_ms);
CREATE INDEX jobs_unfinished ON jobs (state) WHERE state <> 'ended';

CREATE TABLE items (
    job BLOB NOT NULL REFERENCES jobs (id),
    position INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'placed', 'done', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0,
    input_hash BLOB NOT NULL DEFAULT x'',
    output_hash BLOB NOT NULL DEFAULT x'',
    output TEXT NOT NULL DEFAULT '',
    provider BLOB NOT NULL DEFAULT x'',
    agreement BLOB NOT NULL DEFAULT x'',
    call INTEGER NOT NULL DEFAULT -1,
    amount INTEGER NOT NULL DEFAULT 0 CHECK (amount >= 0),
    reason TEXT NOT NULL DEFAULT '',
    changed_ms INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX items_by_state ON items (job, state, position);

CREATE TABLE reservations (
    job BLOB NOT NULL REFERENCES jobs (id),
    holder BLOB NOT NULL CHECK (length(holder) = 32),
    amount INTEGER NOT NULL CHECK (amount >= 0),
    PRIMARY KEY (job, holder)
) STRICT, WITHOUT ROWID;

CREATE TABLE job_events (
    job BLOB NOT NULL REFERENCES jobs (id),
    sequence INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    detail TEXT NOT NULL,
    PRIMARY KEY (job, sequence)
) STRICT, WITHOUT ROWID;

CREATE TABLE peers (
    node_id BLOB PRIMARY KEY CHECK (length(node_id) = 32),
    public_key BLOB NOT NULL DEFAULT x'',
    addresses TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(addresses)),
    source TEXT NOT NULL DEFAULT '',
    agent TEXT NOT NULL DEFAULT '',
    first_seen_ms INTEGER NOT NULL,
    last_seen_ms INTEGER NOT NULL,
    last_connected_ms INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0,
    score INTEGER NOT NULL DEFAULT 0,
    banned_until_ms INTEGER NOT NULL DEFAULT 0,
    ban_reason TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX peers_by_sight ON peers (last_seen_ms);

CREATE TABLE models (
    id BLOB PRIMARY KEY CHECK (length(id) = 32),
    name TEXT NOT NULL,
    size_bytes INTEGER NOT NULL CHECK (size_bytes >= 0),
    origin BLOB NOT NULL DEFAULT x'',
    added_ms INTEGER NOT NULL,
    last_used_ms INTEGER NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0 CHECK (pinned IN (0, 1)),
    facts BLOB NOT NULL DEFAULT x''
) STRICT;
