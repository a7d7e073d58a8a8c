//! Uploads and downloads.

use super::*;

const CHUNK: usize = 8 << 20;

/// What the upload server does wrong, once.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    Nothing,
    /// It takes the first chunk, and its answer is lost.
    ChunkAnswerLost,
    /// It takes a part of the first chunk only.
    HalfAChunk,
    /// It takes the last chunk, and its answer is lost.
    LastAnswerLost,
    /// It takes the first chunk, and does not say where it stands.
    NoStatus,
    /// It takes the last chunk and says that more is to come.
    ActiveAfterTheLast,
    /// It takes nothing, ever.
    AlwaysFails,
    /// The answer is lost, and where it stands can't be asked.
    QueryRefused,
    /// It says that all is there after the first chunk.
    FinalTooEarly,
    /// It refuses the first chunk.
    Refuses,
}

#[derive(Default)]
struct Upstream {
    bytes: Vec<u8>,
    complete: bool,
    wrong_done: bool,
}

/// Google's side of a resumable upload. The session's URL names a host that does not exist.
async fn upstream(wrong: Wrong) -> (Setup, Arc<Mutex<Upstream>>) {
    let state = Arc::new(Mutex::new(Upstream::default()));
    let inner = Arc::clone(&state);
    let setup = serve(patient, move |_, seen| {
        let mut up = inner.lock().unwrap();
        let command = seen.header("x-goog-upload-command").to_owned();
        let reply = |status: Option<&str>, size: usize, body: String| {
            let mut response = Response::builder().header("x-goog-upload-size-received", size);
            if let Some(status) = status {
                response = response.header("x-goog-upload-status", status);
            }
            now(response.body(Body::from(body)).unwrap())
        };
        let file = json!({"file": {"name": "files/given", "state": "ACTIVE"}}).to_string();
        match command.as_str() {
            "start" => {
                let session = "https://user:secret@other.invalid:99/session?upload_id=7";
                now(Response::builder().header("x-goog-upload-url", session).body(Body::empty()).unwrap())
            }
            "query" if wrong == Wrong::QueryRefused => status(400, envelope(400, "INVALID_ARGUMENT")),
            "query" if up.complete => reply(Some("final"), up.bytes.len(), file),
            "query" => reply(Some("active"), up.bytes.len(), String::new()),
            _ => {
                let offset: usize = seen.header("x-goog-upload-offset").parse().unwrap();
                let last = command.contains("finalize");
                if wrong == Wrong::AlwaysFails {
                    return status(503, "");
                }
                if wrong == Wrong::Refuses {
                    return status(403, envelope(403, "PERMISSION_DENIED"));
                }
                assert_eq!(offset, up.bytes.len(), "no byte twice, none left out");
                let first = !std::mem::replace(&mut up.wrong_done, true);
                if first && wrong == Wrong::HalfAChunk {
                    up.bytes.extend_from_slice(&seen.body[..CHUNK / 2]);
                    return status(503, "");
                }
                up.bytes.extend_from_slice(&seen.body);
                up.complete = last && wrong != Wrong::ActiveAfterTheLast;
                match wrong {
                    Wrong::ChunkAnswerLost | Wrong::QueryRefused if first => status(200, broken("")),
                    Wrong::NoStatus if first => reply(None, 0, String::new()),
                    Wrong::FinalTooEarly => reply(Some("final"), 0, file),
                    Wrong::LastAnswerLost if last => status(502, ""),
                    _ if up.complete => reply(Some("final"), 0, file),
                    _ => reply(Some("active"), 0, String::new()),
                }
            }
        }
    })
    .await;
    (setup, state)
}

/// Two chunks.
fn content() -> &'static [u8] {
    static CONTENT: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    CONTENT.get_or_init(|| (0..CHUNK + 10).map(|i| u8::try_from(i % 251).unwrap()).collect())
}

#[tokio::test]
async fn an_upload_goes_on_where_the_server_stands() {
    for (wrong, commands) in [
        (Wrong::Nothing, &["start", "upload", "upload, finalize"][..]),
        (Wrong::ChunkAnswerLost, &["start", "upload", "query", "upload, finalize"]),
        (Wrong::HalfAChunk, &["start", "upload", "query", "upload", "upload, finalize"]),
        (Wrong::NoStatus, &["start", "upload", "query", "upload, finalize"]),
        (Wrong::LastAnswerLost, &["start", "upload", "upload, finalize", "query"]),
    ] {
        let (setup, up) = upstream(wrong).await;
        let file = upload(&setup.client, content()).await.unwrap();
        assert_eq!(
            file.name.to_string(),
            "files/given",
            "{wrong:?}: the name is the one that the server gave"
        );
        assert!(up.lock().unwrap().bytes == content(), "{wrong:?}");
        let log = setup.log();
        assert_eq!(
            log.iter().map(|s| s.header("x-goog-upload-command")).collect::<Vec<_>>(),
            commands,
            "{wrong:?}"
        );
    }
}

#[tokio::test]
async fn an_upload_says_what_it_is_and_stays_with_its_host() {
    let (setup, _) = upstream(Wrong::Nothing).await;
    upload(&setup.client, b"{}\n").await.unwrap();
    let log = setup.log();
    assert_eq!(log[0].uri, "/upload/v1beta/files");
    assert_eq!(
        log[0].json(),
        json!({"file": {"name": "files/f1", "displayName": "d", "mimeType": "application/jsonl", "sizeBytes": "3"}})
    );
    for (name, value) in [
        ("x-goog-upload-protocol", "resumable"),
        ("x-goog-upload-header-content-length", "3"),
        ("x-goog-upload-header-content-type", "application/jsonl"),
    ] {
        assert_eq!(log[0].header(name), value);
    }
    // The session named another host, with a password: the chunk came here all the same, and without.
    assert_eq!((log[1].uri.as_str(), log[1].header("authorization")), ("/session?upload_id=7", ""));
    assert_eq!(log[1].header("x-goog-api-key"), "", "the session's URL is all that a chunk needs");
    // An empty file is one command.
    let (setup, _) = upstream(Wrong::Nothing).await;
    upload(&setup.client, b"").await.unwrap();
    assert_eq!(setup.log()[1].header("x-goog-upload-command"), "upload, finalize");
}

#[tokio::test]
async fn an_upload_that_did_not_work_is_an_error() {
    for (wrong, requests) in [
        (Wrong::ActiveAfterTheLast, 3),
        (Wrong::AlwaysFails, 6), // three tries, and a question before each further one
        (Wrong::QueryRefused, 3),
        (Wrong::FinalTooEarly, 2),
    ] {
        let (setup, _) = upstream(wrong).await;
        let error = upload(&setup.client, content()).await.unwrap_err();
        assert!(!error.is_refusal(), "{wrong:?}: {error}");
        assert!(!error.to_string().contains("upload_id"), "{error}");
        assert_eq!(setup.log().len(), requests, "{wrong:?}");
    }
    let (setup, _) = upstream(Wrong::Refuses).await;
    assert!(upload(&setup.client, content()).await.unwrap_err().is_refusal());
    assert_eq!(setup.log().len(), 2);
    for session in ["", "not a URL", "data:x"] {
        let setup = serve(patient, move |_, _| {
            now(Response::builder().header("x-goog-upload-url", session).body(Body::empty()).unwrap())
        })
        .await;
        assert!(!upload(&setup.client, b"x").await.unwrap_err().is_refusal(), "{session}");
        assert_eq!(setup.log().len(), 1, "{session}");
    }
    // Fewer bytes than promised.
    let (setup, _) = upstream(Wrong::Nothing).await;
    let name = file();
    let short = Upload { name: &name, display_name: "d", mime_type: "text/plain", size: 3 };
    let error = setup.client.upload(&key(), short, &b"ab"[..]).await.unwrap_err();
    assert!(error.to_string().contains("could not be read"), "{error}");
}

#[tokio::test]
async fn a_file_is_downloaded_whole_or_not() {
    let lines = "{\"key\":\"a\"}\n{\"key\":\"b\"}\n";
    let setup = serve(patient, move |_, _| status(200, lines)).await;
    assert_eq!(download(&setup.client).await.unwrap(), lines.as_bytes());
    assert_eq!(setup.uris(), ["/download/v1beta/files/f1:download?alt=media"]);

    let setup = serve(patient, move |_, _| status(200, broken(lines))).await;
    assert!(download(&setup.client).await.is_err(), "half a file is none");
    let setup = serve(patient, |_, _| status(404, envelope(404, "NOT_FOUND"))).await;
    assert!(download(&setup.client).await.unwrap_err().is_absent());
}

#[tokio::test]
async fn a_download_may_take_long_but_not_stand_still() {
    // It takes longer in all than any part of it may.
    let setup = serve(impatient, |_, _| {
        let chunks = futures::stream::iter(0..6).then(|_| async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            Ok::<_, std::io::Error>("x")
        });
        status(200, Body::from_stream(chunks))
    })
    .await;
    assert_eq!(download(&setup.client).await.unwrap(), b"xxxxxx");
    let setup = serve(impatient, |_, _| status(200, stuck("x"))).await;
    let error = download(&setup.client).await.unwrap_err();
    assert!(error.to_string().contains("stood still"), "{error}");
}

/// Whether it knows ranges, does not, or claims to and gives something else.
#[tokio::test]
async fn a_download_that_breaks_off_goes_on_where_it_was() {
    const CONTENT: &str = "0123456789";
    let answer = |ranges: &'static str| {
        move |number: usize, seen: &Seen| {
            let range = seen.headers.get("range").map(|r| r.to_str().unwrap());
            let from = range.map(|r| r["bytes=".len()..r.len() - 1].parse::<usize>().unwrap());
            match (number, from, ranges) {
                (1, None, _) => status(200, broken(&CONTENT[..4])),
                // It breaks off again, further on.
                (2, Some(4), "known") => now(Response::builder()
                    .status(206)
                    .header("content-range", "bytes 4-9/10")
                    .body(broken(&CONTENT[4..7]))
                    .unwrap()),
                (3, Some(7), "known") => now(Response::builder()
                    .status(206)
                    .header("content-range", "bytes 7-9/10")
                    .body(Body::from(&CONTENT[7..]))
                    .unwrap()),
                (2, Some(4), "unknown") => status(200, broken(&CONTENT[..6])),
                (3, Some(6), "unknown") => status(200, CONTENT),
                (2, Some(4), "shorter") => status(200, &CONTENT[..3]),
                (_, Some(4), "other") => now(Response::builder()
                    .status(206)
                    .header("content-range", "bytes 0-9/10")
                    .body(Body::from(CONTENT))
                    .unwrap()),
                (_, Some(4), "gone") => status(404, envelope(404, "NOT_FOUND")),
                (_, Some(4), "shorter") => status(200, &CONTENT[..2]),
                other => panic!("{other:?}"),
            }
        }
    };
    for ranges in ["known", "unknown"] {
        let setup = serve(patient, answer(ranges)).await;
        assert_eq!(download(&setup.client).await.unwrap(), CONTENT.as_bytes(), "{ranges}");
        assert_eq!(setup.uris().len(), 3);
    }
    for wrong in ["shorter", "other"] {
        let setup = serve(patient, answer(wrong)).await;
        assert!(!download(&setup.client).await.unwrap_err().is_absent(), "{wrong}");
    }
    let setup = serve(patient, answer("gone")).await;
    assert!(download(&setup.client).await.unwrap_err().is_absent());
    assert_eq!(setup.uris().len(), 2, "a refusal is not asked about again");
}
