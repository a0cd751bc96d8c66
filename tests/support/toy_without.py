"""A scorer for tests whose package nobody has."""

import no_such_package  # noqa: F401
