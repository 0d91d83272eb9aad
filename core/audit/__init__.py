"""The auditor: a running evaluation is watched, and each rule of the challenge gets a finding with its evidence."""
