//! Credentials as they stand in a Secret. Pure: no client required.

use std::collections::BTreeMap;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use super::error::{Error, Kind};
use super::location::Scheme;

/// The `data` of a Secret.
pub type SecretData = BTreeMap<String, Vec<u8>>;

/// Credentials for one kind of store. Redact themselves.
#[derive(Debug)]
pub enum Credentials {
    /// An access key.
    S3(S3Keys),
    /// A service account's key.
    Gs(GsKey),
    /// An account's key, a shared access signature or an application.
    Az(AzKeys),
}

/// An access key of S3.
#[derive(Debug)]
pub struct S3Keys {
    id: SecretString,
    secret: SecretString,
    token: Option<SecretString>,
}

impl S3Keys {
    pub(super) fn apply(&self, builder: AmazonS3Builder) -> AmazonS3Builder {
        let builder = builder
            .with_access_key_id(self.id.expose_secret())
            .with_secret_access_key(self.secret.expose_secret());
        match &self.token {
            Some(token) => builder.with_token(token.expose_secret()),
            None => builder,
        }
    }
}

/// The key of a Google service account.
#[derive(Debug)]
pub struct GsKey {
    /// JSON with what is used of the key, and nothing that leads somewhere else.
    json: SecretString,
    /// For emulators: no token is asked for.
    no_token: bool,
    secret: String,
}

impl GsKey {
    pub(super) fn apply(
        &self,
        builder: GoogleCloudStorageBuilder,
        custom: bool,
    ) -> Result<GoogleCloudStorageBuilder, Error> {
        if self.no_token && !custom {
            return Err(Error::new(
                Kind::Credentials,
                format!(
                    "the key in Secret {} has disable_oauth, which is for emulators behind an endpoint",
                    self.secret
                ),
            ));
        }
        Ok(builder.with_service_account_key(self.json.expose_secret()))
    }
}

/// Credentials of Azure.
#[derive(Debug)]
pub enum AzKeys {
    /// The account's own key.
    Account(SecretString),
    /// A shared access signature, as pairs of a query.
    Signature(Vec<(String, SecretString)>),
    /// An application that is known to Entra ID.
    Application {
        /// Tenant.
        tenant: String,
        /// Client.
        client: String,
        /// Its secret.
        secret: SecretString,
    },
}

impl AzKeys {
    pub(super) fn apply(&self, builder: MicrosoftAzureBuilder) -> MicrosoftAzureBuilder {
        match self {
            Self::Account(key) => builder.with_access_key(key.expose_secret()),
            Self::Signature(pairs) => {
                let pairs: Vec<_> = pairs
                    .iter()
                    .map(|(name, value)| (name.clone(), value.expose_secret().to_owned()))
                    .collect();
                builder.with_sas_authorization(pairs)
            }
            Self::Application { tenant, client, secret } => {
                builder.with_client_secret_authorization(client, secret.expose_secret(), tenant)
            }
        }
    }
}

impl Credentials {
    /// Reads what is needed for that kind of store. `name` is the Secret's, for messages.
    pub fn read(scheme: Scheme, name: &str, data: &SecretData) -> Result<Self, Error> {
        let secret = Secret { name, data };
        match scheme {
            Scheme::S3 => s3(&secret).map(Self::S3),
            Scheme::Gs => gs(&secret).map(Self::Gs),
            Scheme::Az => az(&secret).map(Self::Az),
            Scheme::File => Err(Error::new(Kind::Invalid, "file:// takes no credentials")),
        }
    }
}

struct Secret<'a> {
    name: &'a str,
    data: &'a SecretData,
}

impl Secret<'_> {
    /// The first that is there. A newline at its end is nobody's intention.
    fn get(&self, keys: &[&str]) -> Result<Option<String>, Error> {
        let Some((key, value)) = keys.iter().find_map(|key| Some((key, self.data.get(*key)?))) else {
            return Ok(None);
        };
        let text = std::str::from_utf8(value).map(str::trim).ok().filter(|text| !text.is_empty());
        let text = text.ok_or_else(|| self.invalid(&format!("has a key {key} that is empty or no text")))?;
        Ok(Some(text.to_owned()))
    }

    /// One that goes into a header.
    fn word(&self, keys: &[&str]) -> Result<Option<String>, Error> {
        let value = self.get(keys)?;
        if value.as_ref().is_some_and(|v| !v.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(self.invalid(&format!(
                "has a key {} with spaces or other characters that can't be in one",
                keys[0]
            )));
        }
        Ok(value)
    }

    fn invalid(&self, what: &str) -> Error {
        Error::new(Kind::Credentials, format!("Secret {} {what}", self.name))
    }
}

fn s3(secret: &Secret<'_>) -> Result<S3Keys, Error> {
    let id = secret.word(&["accessKeyId", "AWS_ACCESS_KEY_ID"])?;
    let key = secret.word(&["secretAccessKey", "AWS_SECRET_ACCESS_KEY"])?;
    let token = secret.word(&["sessionToken", "AWS_SESSION_TOKEN"])?;
    match (id, key) {
        (Some(id), Some(key)) => {
            Ok(S3Keys { id: id.into(), secret: key.into(), token: token.map(Into::into) })
        }
        _ => Err(secret.invalid("lacks accessKeyId or secretAccessKey, which s3:// needs: add them")),
    }
}

fn gs(secret: &Secret<'_>) -> Result<GsKey, Error> {
    #[derive(Deserialize)]
    struct Key {
        client_email: String,
        #[serde(rename = "private_key")]
        private: String,
        #[serde(rename = "private_key_id")]
        id: String,
        #[serde(default)]
        disable_oauth: bool,
    }
    let json = secret.get(&["serviceAccountKey", "key.json"])?.ok_or_else(|| {
        secret.invalid("lacks serviceAccountKey, which gs:// needs: add the JSON key of a service account")
    })?;
    let key: Key = serde_json::from_str(&json).map_err(|_| {
        secret.invalid("has a serviceAccountKey that is not the JSON key of a service account")
    })?;
    // Anything else in it is left behind: gcs_base_url, for one, would lead the token wherever it says.
    let json = serde_json::json!({
        "client_email": key.client_email,
        "private_key": key.private,
        "private_key_id": key.id,
        "disable_oauth": key.disable_oauth,
    });
    Ok(GsKey { json: json.to_string().into(), no_token: key.disable_oauth, secret: secret.name.to_owned() })
}

fn az(secret: &Secret<'_>) -> Result<AzKeys, Error> {
    if let Some(key) = secret.word(&["accountKey", "AZURE_STORAGE_ACCOUNT_KEY"])? {
        return Ok(AzKeys::Account(key.into()));
    }
    if let Some(sas) = secret.word(&["sasToken", "AZURE_STORAGE_SAS_TOKEN"])? {
        let query = sas.trim_start_matches('?');
        let pairs: Vec<_> = url::form_urlencoded::parse(query.as_bytes())
            .map(|(name, value)| (name.into_owned(), value.into_owned().into()))
            .collect();
        return if pairs.iter().any(|(name, _)| name == "sig") {
            Ok(AzKeys::Signature(pairs))
        } else {
            Err(secret.invalid("has a sasToken that is no shared access signature (?sv=…&sig=…)"))
        };
    }
    let tenant = secret.word(&["tenantId", "AZURE_TENANT_ID"])?;
    let client = secret.word(&["clientId", "AZURE_CLIENT_ID"])?;
    let password = secret.word(&["clientSecret", "AZURE_CLIENT_SECRET"])?;
    match (tenant, client, password) {
        (Some(tenant), Some(client), Some(password)) => {
            // It becomes a part of a URL.
            if tenant.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-')) {
                Ok(AzKeys::Application { tenant, client, secret: password.into() })
            } else {
                Err(secret.invalid("has a tenantId that is none"))
            }
        }
        _ => Err(secret.invalid(
            "lacks what az:// needs: add accountKey, sasToken, or tenantId, clientId and clientSecret",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(scheme: Scheme, data: &[(&str, &str)]) -> Result<Credentials, String> {
        let data = data.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect();
        Credentials::read(scheme, "store", &data).map_err(|e| {
            assert_eq!(e.kind, Kind::Credentials);
            e.to_string()
        })
    }

    #[test]
    fn both_spellings_are_read_and_a_last_newline_is_nobodys_intention() {
        for names in [["accessKeyId", "secretAccessKey"], ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]] {
            let Credentials::S3(keys) = read(Scheme::S3, &[(names[0], "AKIA\n"), (names[1], "s")]).unwrap()
            else {
                unreachable!("asked for S3")
            };
            assert_eq!((keys.id.expose_secret(), keys.secret.expose_secret()), ("AKIA", "s"));
        }
    }

    #[test]
    fn what_is_missing_is_named_and_what_is_there_is_not_shown() {
        let canary = "CANARY with spaces";
        for (scheme, data, says) in [
            (Scheme::S3, &[("accessKeyId", "CANARY")][..], "secretAccessKey"),
            (Scheme::S3, &[("accessKeyId", canary), ("secretAccessKey", "x")], "accessKeyId"),
            (Scheme::S3, &[("accessKeyId", ""), ("secretAccessKey", "x")], "accessKeyId that is empty"),
            (Scheme::Gs, &[], "serviceAccountKey"),
            (Scheme::Gs, &[("serviceAccountKey", "{\"client_email\": \"CANARY\"}")], "not the JSON key"),
            (Scheme::Az, &[("clientId", "CANARY")], "clientSecret"),
            (Scheme::Az, &[("sasToken", "sv=CANARY")], "no shared access signature"),
            (
                Scheme::Az,
                &[("tenantId", "evil/CANARY"), ("clientId", "c"), ("clientSecret", "s")],
                "tenantId",
            ),
        ] {
            let message = read(scheme, data).unwrap_err();
            assert!(message.starts_with("Secret store ") && message.contains(says), "{message}");
            assert!(!message.contains("CANARY"), "{message}");
        }
    }

    #[test]
    fn credentials_show_nothing_of_themselves() {
        let all = [
            read(
                Scheme::S3,
                &[("accessKeyId", "CANARY"), ("secretAccessKey", "CANARY"), ("sessionToken", "CANARY")],
            ),
            read(Scheme::Az, &[("accountKey", "CANARY")]),
            read(Scheme::Az, &[("sasToken", "?sv=1&sig=CANARY")]),
            read(
                Scheme::Gs,
                &[(
                    "key.json",
                    "{\"client_email\":\"a\",\"private_key\":\"CANARY\",\"private_key_id\":\"x\"}",
                )],
            ),
        ];
        for credentials in all {
            let shown = format!("{:?}", credentials.unwrap());
            assert!(!shown.contains("CANARY"), "{shown}");
        }
    }

    #[test]
    fn a_google_key_leads_nowhere_else() {
        let key = r#"{"client_email":"a","private_key":"p","private_key_id":"i","gcs_base_url":"https://evil.example.com",
            "token_uri":"https://evil.example.com","disable_oauth":true}"#;
        let Credentials::Gs(key) = read(Scheme::Gs, &[("serviceAccountKey", key)]).unwrap() else {
            unreachable!("asked for Cloud Storage")
        };
        assert!(!key.json.expose_secret().contains("evil"));
        // Without a token only behind an endpoint.
        assert!(key.apply(GoogleCloudStorageBuilder::new(), true).is_ok());
        assert_eq!(key.apply(GoogleCloudStorageBuilder::new(), false).unwrap_err().kind, Kind::Credentials);
    }
}
