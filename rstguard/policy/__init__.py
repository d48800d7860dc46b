"""The policy language: model, located errors, and compilation to a RuleSet."""
