"""Ready-made configurations, as YAML files beside this module."""
