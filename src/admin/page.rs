//! `/`: the status page, one document with its style and script in it, which asks `/status` and `/history` and nothing else.
//!
//! What it shows comes from clients too: ids, topics, Kafka's words about them. The script sets text only, and the policy
//! below holds even if it did not: no script or style runs but those with the nonce of this very answer, no markup is made
//! from strings (trusted types), nothing is loaded from anywhere.

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

const PAGE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = concat!(
    include_str!("page/words.js"),
    include_str!("page/path.js"),
    include_str!("page/charts.js"),
    include_str!("page/page.js"),
);

/// The page.
pub(super) async fn page() -> Response {
    let nonce = BASE64_STANDARD.encode(rand::random::<[u8; 16]>());
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
         trusted-types 'none'"
    );
    let headers: [(HeaderName, &str); 5] = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, &policy),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("permissions-policy"), "camera=(), geolocation=(), microphone=()"),
        // The nonce is for this answer alone.
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, document(&nonce)).into_response()
}

fn document(nonce: &str) -> String {
    let page = PAGE.replace("{{nonce}}", nonce).replace("{{version}}", env!("CARGO_PKG_VERSION"));
    page.replace("{{style}}", STYLE).replace("{{script}}", SCRIPT)
}

/// No answer is taken for something else than it says, nor read by other sites.
pub(super) async fn no_sniffing(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_complete_and_holds_no_markup_that_the_policy_forbids() {
        let document = document("n0nce");
        assert!(!document.contains("{{") && document.contains("<style nonce=\"n0nce\">"));
        assert_eq!(document.matches("<script").count(), 1);
        assert_eq!(document.matches("<script nonce=\"n0nce\">").count(), 1);
        for forbidden in ["style=\"", " onclick", " onload", "http://", "https://", "@import", "url("] {
            // The one name that looks like an address, and is none.
            let document = document.replace("http://www.w3.org/2000/svg", "");
            assert!(!document.contains(forbidden), "{forbidden}");
        }
        for forbidden in ["innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function("] {
            assert!(!SCRIPT.contains(forbidden), "{forbidden}");
        }
        // The script must not end early.
        assert!(!SCRIPT.to_lowercase().contains("</script") && !SCRIPT.contains("<!--"));
    }
}
