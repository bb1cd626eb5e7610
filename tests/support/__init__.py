"""What several tests share: inputs and bounds, checks of whole calls, fakes. No tests."""
