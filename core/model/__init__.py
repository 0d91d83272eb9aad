"""The model spec: settings, parameter table, storage, tables that the host makes."""
