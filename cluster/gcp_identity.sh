#!/bin/sh
# Put this instance's identity token where the AWS SDK looks for it (AWS_WEB_IDENTITY_TOKEN_FILE), whole or not at all.
# It lasts an hour; gcp.yaml has cron renew it.
curl -sf -H 'Metadata-Flavor: Google' -o "$HOME/identity.new" \
  'http://metadata.google.internal/computeMetadata/v1/instance/service-accounts/default/identity?audience=sts.amazonaws.com&format=full' &&
  mv "$HOME/identity.new" "$HOME/identity"
