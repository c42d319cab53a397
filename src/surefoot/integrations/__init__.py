"""What a framework needs to be told about surefoot; all else works with them as it is.

Each module imports its framework, and is imported by nothing else of surefoot: `surefoot.integrations.transformers`
and `.lightning` log telemetry, `.timm` registers names.
"""
