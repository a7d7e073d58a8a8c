//! What a request must look like for each method. Pure: no client required.
//!
//! Only what tells the methods apart is looked at: the rest of a request is Google's to judge, which knows fields
//! that this operator does not. But one line of the wrong kind makes Google refuse the whole file.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::api::Method;

/// Name of the message in Google's API.
#[must_use]
pub fn message_name(method: Method) -> &'static str {
    match method {
        Method::GenerateContent => "GenerateContentRequest",
        Method::EmbedContent => "EmbedContentRequest",
    }
}

/// What a request looks like, for messages.
#[must_use]
pub fn example(method: Method) -> &'static str {
    match method {
        Method::GenerateContent => "{\"contents\": […]}",
        Method::EmbedContent => "{\"content\": {\"parts\": [{\"text\": \"…\"}]}}",
    }
}

/// The request that the short form stands for.
#[must_use]
pub fn short_form(method: Method, prompt: &str) -> Value {
    let parts = json!([{ "text": prompt }]);
    match method {
        Method::GenerateContent => json!({"contents": [{"role": "user", "parts": parts}]}),
        Method::EmbedContent => json!({"content": {"parts": parts}}),
    }
}

/// What is wrong with a request, if it is one for another method or can't be one for this. `request` is an object.
pub fn check(method: Method, request: &RawValue) -> Result<(), &'static str> {
    #[derive(Deserialize)]
    struct Request<'a> {
        contents: Option<IgnoredAny>,
        #[serde(borrow)]
        content: Option<&'a RawValue>,
    }
    let Ok(request) = serde_json::from_str::<Request<'_>>(request.get()) else {
        return Err("has a \"request\" that gives \"content\" or \"contents\" twice");
    };
    match (method, request.content, request.contents) {
        (Method::GenerateContent, Some(_), None) => Err(
            "has a \"request\" with \"content\" instead of \"contents\": for embeddings set spec.method to \
             EmbedContent",
        ),
        (Method::EmbedContent, _, Some(_)) => Err(
            "has a \"request\" with \"contents\", which EmbedContent does not take: each request embeds one \"content\"",
        ),
        (Method::EmbedContent, None, None) => Err("has a \"request\" without \"content\""),
        (Method::EmbedContent, Some(content), None) if !content.get().starts_with('{') => {
            Err("has a \"content\" that is not a JSON object")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Method::{EmbedContent, GenerateContent};

    #[test]
    fn requests_of_the_other_method_are_told() {
        let whole = r#"{"content":{"parts":[{"text":"x"}]},"taskType":"CLUSTERING","title":"t","outputDimensionality":256}"#;
        for (method, request, expected) in [
            (GenerateContent, r#"{"contents":[]}"#, None),
            (GenerateContent, r#"{"contents":[],"content":{}}"#, None),
            (GenerateContent, r#"{"cachedContent":"x"}"#, None),
            (GenerateContent, r"{}", None),
            (GenerateContent, r#"{"content":{}}"#, Some("set spec.method to EmbedContent")),
            (EmbedContent, whole, None),
            (EmbedContent, r#"{ "content" : {} }"#, None),
            (EmbedContent, r#"{"contents":[]}"#, Some("which EmbedContent does not take")),
            (EmbedContent, r#"{"contents":[],"content":{}}"#, Some("which EmbedContent does not take")),
            (EmbedContent, r"{}", Some("without \"content\"")),
            (EmbedContent, r#"{"content":null}"#, Some("without \"content\"")),
            (EmbedContent, r#"{"content":"text"}"#, Some("that is not a JSON object")),
            (EmbedContent, r#"{"content":[]}"#, Some("that is not a JSON object")),
            (EmbedContent, r#"{"content":{},"content":{}}"#, Some("twice")),
            (GenerateContent, r#"{"contents":[],"contents":[]}"#, Some("twice")),
        ] {
            let raw = RawValue::from_string(request.to_owned()).unwrap();
            let found = check(method, &raw).err();
            assert_eq!(found.is_some(), expected.is_some(), "{method:?} {request}: {found:?}");
            assert!(found.is_none_or(|says| says.contains(expected.unwrap())), "{request}: {found:?}");
        }
    }

    #[test]
    fn the_short_form_is_what_each_method_takes() {
        for method in [GenerateContent, EmbedContent] {
            let raw = RawValue::from_string(short_form(method, "Hi").to_string()).unwrap();
            assert_eq!(check(method, &raw), Ok(()));
        }
        assert_eq!(short_form(EmbedContent, "Hi"), json!({"content": {"parts": [{"text": "Hi"}]}}));
    }
}
