"""The pipeline that users call: `EditARPipeline`, and its parts."""
