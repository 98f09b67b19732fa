"""Every error that FedMeZO raises on purpose.

    FedMezoError
      ConfigError            a setting, file or command-line value is wrong
        PolicyError          a run asks for more than this worker's operator allows
      DataError              a worker's or the held-out data cannot be used
      ModelError             a model folder or name cannot be used
      NumericError           a NaN, an infinity or an overflow in weights or coefficients
        MeasurementError     a loss came out as NaN or infinity
          CutShortError      it was ended because it can no longer count
      MismatchError          two parties do not hold the same model, tokenizer or recipe
      ProtocolError          a peer broke the protocol
        VersionError         the peers share no protocol version
        WrongRunError        the peer is in another run
        UnknownWorkerError   no such worker is joined
        ReplacedError        another process has joined under the same name
        StaleTicketError     an answer to a ticket that is not open (another epoch, round or slot)
        EquivocationError    a second, different answer to one ticket
        ScalarError          a projected gradient outside what the run allows
        SignatureError       an answer whose signature is missing, or not its worker's for it
        SecureSumError       a sum that hides its terms cannot go on with this party
        NotReadyError        the coordinator cannot take this now; a retry later can succeed
      DivergedError          a party's weights are not the run's weights
      ExcludedError          the operator has excluded this worker from the run
      JournalError           the journal cannot be opened, read or appended to
        JournalLockedError   another process has the journal open
          FencedError        another coordinator has taken over the journal; this one must not write
        JournalCorruptError  the journal's bytes are not what was written
        JournalBehindError   it ends before a record that was on the disk or was applied
        JournalFullError     the disk took no more records
        JournalCompactedError  the records asked for were dropped; begin from a snapshot
      SnapshotError          a snapshot is missing, or cannot be written, read or used
        SnapshotDamagedError its bytes or weights are not what was recorded
      IdentityError          who a peer is cannot be established
        TokenError           a join string that lets nobody join: cut off, used, expired, foreign
        RevokedError         the peer's key is no member's any more
      ForbiddenError         the peer is known and may not do this
      PrivacyError           the privacy ledger cannot be used
        PrivacyBudgetError   the data has given away what it may
      UnavailableError       the other side cannot be reached; retrying may help
        StartingError        it is there and starts; it will answer when that is done

Messages are one sentence for a person: what is wrong, with its name and value, and what to do next.
Each class names the gRPC status code that it travels as. `fedmezo_core.wire.grpc_status` has the
table from a code and reason back to a class.
"""

from __future__ import annotations

from typing import ClassVar


class FedMezoError(Exception):
    """Root of the tree; `str(error)` is the sentence a user reads."""

    status: ClassVar[str] = "INTERNAL"
    """Name of the `grpc.StatusCode` this error travels as."""
    retry_after_s: float | None = None
    """How long the other side asks to wait: retry at a random time within this many seconds."""


class ConfigError(FedMezoError):
    """A setting is missing, malformed or out of its range."""

    status = "INVALID_ARGUMENT"


class RunExistsError(ConfigError):
    """A run is to be created under the name of another one."""

    status = "ALREADY_EXISTS"


class OneRunError(ConfigError):
    """A coordinator that serves one run is asked for something about others."""

    status = "UNIMPLEMENTED"


class PolicyError(ConfigError):
    """A run asks for more than the operator of this worker allows; names the contract's values."""


class DataError(FedMezoError):
    """A data file, column, label or template cannot be used."""

    status = "INVALID_ARGUMENT"


class ModelError(FedMezoError):
    """A model or tokenizer cannot be loaded or used."""

    status = "INVALID_ARGUMENT"


class NumericError(FedMezoError):
    """A weight, coefficient or result is NaN or infinite."""

    status = "OUT_OF_RANGE"


class MeasurementError(NumericError):
    """A measurement gave a loss that is NaN or infinite."""


class CutShortError(MeasurementError):
    """A measurement was ended before its end, because it can no longer count."""


class MismatchError(FedMezoError):
    """Manifest, base weights, tokenizer or numeric recipe differ between two parties."""

    status = "FAILED_PRECONDITION"


class ProtocolError(FedMezoError):
    """A message that the protocol does not allow here."""

    status = "INVALID_ARGUMENT"


class VersionError(ProtocolError):
    """The two sides have no protocol version in common."""

    status = "UNIMPLEMENTED"


class WrongRunError(ProtocolError):
    """The message names another run than the one that is served."""

    status = "NOT_FOUND"


class UnknownWorkerError(ProtocolError):
    """The message comes from a worker that has not joined."""

    status = "NOT_FOUND"


class ReplacedError(ProtocolError):
    """Another process has joined under the same name, and its session is the one that counts."""


class StaleTicketError(ProtocolError):
    """The ticket is not open: another epoch, round or slot. The answer is dropped."""

    status = "FAILED_PRECONDITION"


class EquivocationError(ProtocolError):
    """A second, different answer to one ticket. The first answer stands."""

    status = "ALREADY_EXISTS"


class ScalarError(ProtocolError):
    """A projected gradient is not finite or outside the run's clip, or their count is wrong."""

    status = "OUT_OF_RANGE"


class SignatureError(ProtocolError):
    """An answer is not signed by its worker's key for its run, ticket and history, but must be."""

    status = "PERMISSION_DENIED"


class SecureSumError(ProtocolError):
    """A sum that hides its terms cannot go on with this party."""

    status = "FAILED_PRECONDITION"

    useless_shares_of: tuple[int, ...] = ()
    """Slots of the members whose shares are the reason, if they are."""


class NotReadyError(ProtocolError):
    """The request is sound but cannot be served now (full, starting, or finished)."""

    status = "RESOURCE_EXHAUSTED"


class DivergedError(FedMezoError):
    """A party's weights digest is not the run's."""

    status = "DATA_LOSS"


class ExcludedError(FedMezoError):
    """The run's operator has excluded the worker; it takes no part until it is readmitted."""

    status = "PERMISSION_DENIED"


class JournalError(FedMezoError):
    """The journal cannot be opened, read or appended to."""

    status = "INTERNAL"


class JournalLockedError(JournalError):
    """Another process holds the journal."""


class FencedError(JournalLockedError):
    """Another coordinator has taken over the journal since this one opened it."""


class JournalCorruptError(JournalError):
    """A record's bytes, order or hash are not what was appended."""

    status = "DATA_LOSS"


class JournalBehindError(JournalError):
    """The journal lacks its newest records: it was cut, or is an older copy. It may be put back."""

    status = "FAILED_PRECONDITION"


class JournalFullError(JournalError):
    """The disk is full."""

    status = "RESOURCE_EXHAUSTED"


class JournalCompactedError(JournalError):
    """The records asked for were dropped from the journal; a snapshot takes their place."""

    status = "OUT_OF_RANGE"


class SnapshotError(FedMezoError):
    """A snapshot is missing or cannot be used; the journal may still be."""

    status = "NOT_FOUND"


class SnapshotDamagedError(SnapshotError):
    """A snapshot's bytes or weights are not what the journal says."""

    status = "DATA_LOSS"


class IdentityError(FedMezoError):
    """Who a peer is cannot be established: a certificate, key or state folder cannot be used."""

    status = "UNAUTHENTICATED"


class TokenError(IdentityError):
    """A join string or its token lets nobody join: cut off, used, expired or of another side."""


class RevokedError(IdentityError):
    """The peer's key is no member's: it was revoked, replaced or never enrolled here."""


class ForbiddenError(FedMezoError):
    """The peer is known, and may not do this."""

    status = "PERMISSION_DENIED"


class PrivacyError(FedMezoError):
    """A worker's privacy ledger cannot be opened, read or appended to; nothing may be sent."""

    status = "FAILED_PRECONDITION"


class PrivacyBudgetError(PrivacyError):
    """A worker's data has given away all that its operator allows."""

    status = "RESOURCE_EXHAUSTED"


class UnavailableError(FedMezoError):
    """The other side cannot be reached."""

    status = "UNAVAILABLE"


class StartingError(UnavailableError):
    """The other side is starting and says what it does; nothing is wrong."""
