"""Tests wait for events, not for seconds: a machine may be busy with something else. Only a hang must come to an end."""

LAST_RESORT = 900  # seconds; nothing that works takes so long, however busy the machine is
