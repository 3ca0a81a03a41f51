"""Errors of S3 in words: what each means, in one line, and what to do about it."""

from __future__ import annotations

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
    ReadTimeoutError,
    SSLError,
    TokenRetrievalError,
)

from apacs_ray.doctor.finding import Finding, message_of
from apacs_ray.storage import S3Store

KEYS = (
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the role; aws sts get-caller-identity names it"
)
CREDENTIALS = {
    "InvalidAccessKeyId": "the store does not know the access key",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "InvalidClientTokenId": "the store does not know the access key",
    "AuthFailure": "the store does not accept the credentials",
    "InvalidToken": "the session token is not valid",
    "ExpiredToken": "the session token has expired",
    "ExpiredTokenException": "the session token has expired",
    "TokenRefreshRequired": "the session token has expired",
}
REGION = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    TokenRetrievalError,
    ProfileNotFound,
)
UNREACHABLE = (HTTPClientError, ConnectionError)


def denied(error: ClientError) -> bool:
    """Return whether the credentials are good and the right to do this is missing."""
    answer = error.response
    code = answer["Error"].get("Code", "")
    return code in ("AccessDenied", "AllAccessDisabled", "403") or (
        answer["ResponseMetadata"]["HTTPStatusCode"] == 403 and code not in CREDENTIALS and "Skewed" not in code
    )


def explain(name: str, store: S3Store, error: Exception) -> Finding:
    """Return the failed line of an error from boto3."""
    message, advice = _answer(store, error) if isinstance(error, ClientError) else _no_answer(store, error)
    return Finding(name, "failed", f"{store.uri}: {message}", advice)


def explain_setup(name: str, error: Exception) -> Finding:
    """Return the failed line of a store that could not be set up: its URI is wrong, or the credentials."""
    advice = KEYS if isinstance(error, BotoCoreError) or "credentials" in str(error) else "correct the URI"
    return Finding(name, "failed", message_of(error), advice)


def _answer(store: S3Store, error: ClientError) -> tuple[str, str]:
    answer = error.response
    code, status = answer["Error"].get("Code", ""), answer["ResponseMetadata"]["HTTPStatusCode"]
    if code == "NoSuchBucket":
        return (
            f"there is no bucket {store.bucket} at {_endpoint(store)}",
            f"correct the name, or: aws s3 mb s3://{store.bucket}",
        )
    if code in CREDENTIALS:
        return f"{CREDENTIALS[code]} ({code})", KEYS
    if "Skewed" in code:
        return "this machine's clock is too far from the store's", "set the clock: timedatectl set-ntp true"
    if code in REGION:
        region = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region") or answer["Error"].get(
            "Region"
        )
        return (
            f"the bucket is in another region than {store.access.region}",
            f"set AWS_DEFAULT_REGION={region or 'the region of the bucket'}",
        )
    if status >= 500:
        return f"the store answers {code or status}", "the store is overloaded or out of order: try again later"
    advice = "check AWS_ENDPOINT_URL: does an S3 store answer there?" if store.access.endpoint else "check the URI"
    return f"the store answers {status} {code}: {answer['Error'].get('Message', '')}", advice


def _no_answer(store: S3Store, error: Exception) -> tuple[str, str]:
    where = _endpoint(store)
    if isinstance(error, NO_CREDENTIALS):
        return message_of(error), KEYS
    if isinstance(error, SSLError):
        return (
            f"no TLS connection to {where}: {message_of(error)}",
            "for a CA of your own set AWS_CA_BUNDLE and SSL_CERT_FILE",
        )
    if isinstance(error, ProxyConnectionError):
        return f"the proxy does not connect to {where}", "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
    if isinstance(error, ConnectTimeoutError | ReadTimeoutError):
        return (
            f"no answer from {where} within the time limit",
            "check AWS_ENDPOINT_URL, firewall, proxy and VPC endpoint",
        )
    if isinstance(error, UNREACHABLE):
        return f"nobody answers at {where}", "check AWS_ENDPOINT_URL, the network, name resolution and the proxy"
    if isinstance(error, BotoCoreError):
        return message_of(error), "check the URI and the AWS settings"
    return message_of(error), "check AWS_ENDPOINT_URL: does an S3 store answer there?"


def _endpoint(store: S3Store) -> str:
    return store.access.endpoint or f"AWS S3 ({store.access.region or 'no region set'})"
