"""π0 and π0.5: vision-language-action models that turn noise into a chunk of actions by flow matching."""
