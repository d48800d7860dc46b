"""The supervisor process: brings the guard up, keeps it up, changes its policy, takes it down."""
