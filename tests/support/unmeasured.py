"""Telemetry events without a metric."""

from __future__ import annotations

from typing import Final

from logto_webhooks import instrumentation as telemetry
from logto_webhooks.instrumentation import TelemetryEvent

# Event -> why.
UNMEASURED: Final[dict[type[TelemetryEvent], str]] = {
    telemetry.ClockSetBack: "rare; see the log",
    telemetry.KeyEnded: "see the log, and `doctor`",
    telemetry.DeliveriesLost: "the process ends; see the log",
    telemetry.Resumed: "see `stalls`",
    telemetry.NotOpened: "see the gauge `database_up`",
    telemetry.Opened: "see the gauge `database_up`",
    telemetry.FlowResumed: "see the gauge `silent`",
    telemetry.HandlersKnown: "`handlers list` shows them",
    telemetry.Unrunnable: "`handlers list` counts them",
    telemetry.RowsNotWritten: "see the gauges `mapped_rows_…`",
    telemetry.MembershipsDelayed: "see the log, and the gauge `memberships_to_end`",
    telemetry.TablesNotMigrated: "see the log, and `doctor --app`",
}
