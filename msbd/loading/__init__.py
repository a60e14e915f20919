"""Files to nets: with msbd/load.py the only code that joins nets and weights."""
