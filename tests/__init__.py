"""The tests; a package so that tests.helpers can be imported."""
