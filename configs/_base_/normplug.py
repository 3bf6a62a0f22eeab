# The one line that an mmdet or mmaction2 config needs.
custom_imports = dict(imports=["normplug"], allow_failed_imports=False)
